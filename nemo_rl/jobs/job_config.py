"""The configurations of all training jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from nemo_rl.algorithms.config import MasterConfig, OnPolicyJobConfig
from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.algorithms.record_config import RecordJobConfig
from nemo_rl.algorithms.reward_model_config import RewardModelJobConfig
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.utils.config import load_config, sections_of

# They share the sections `policy`, `cluster`, `logger` and `checkpointing`.
JobConfig: TypeAlias = OnPolicyJobConfig | RecordJobConfig

# The configuration of a job is known by the section of its algorithm.
RECORD_JOBS: tuple[type[RecordJobConfig], ...] = (SFTJobConfig, DPOJobConfig, RewardModelJobConfig)


def load_job_config(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Load the configuration of any training job: of the algorithm that has a section in the file, else of GRPO.

    Raises:
        ConfigError: See `load_config`.
    """
    sections = sections_of(path)
    for schema in RECORD_JOBS:
        if schema.section in sections:
            return load_config(schema, path, overrides)
    if "distillation" in sections:
        return load_config(DistillationJobConfig, path, overrides)
    return load_config(MasterConfig, path, overrides)
