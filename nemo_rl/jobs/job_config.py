"""The configurations of all training jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from nemo_rl.algorithms.config import MasterConfig, OnPolicyJobConfig
from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.utils.config import load_config, sections_of

# They share the sections `policy`, `cluster`, `logger` and `checkpointing`.
JobConfig: TypeAlias = OnPolicyJobConfig | SFTJobConfig


def load_job_config(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Load the configuration of any training job: of the algorithm that has a section in the file, else of GRPO.

    Raises:
        ConfigError: See `load_config`.
    """
    sections = sections_of(path)
    if "sft" in sections:
        return load_config(SFTJobConfig, path, overrides)
    if "distillation" in sections:
        return load_config(DistillationJobConfig, path, overrides)
    return load_config(MasterConfig, path, overrides)
