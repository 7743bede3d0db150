"""The configurations of all training jobs, and of the evaluation in their background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from nemo_rl.algorithms.config import MasterConfig, OnPolicyJobConfig
from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.algorithms.eval_config import EvalConfig, from_training
from nemo_rl.algorithms.record_config import RecordJobConfig
from nemo_rl.algorithms.reward_model_config import RewardModelJobConfig
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.utils.config import load_config, sections_of, validate

# They share the sections `policy`, `cluster`, `logger` and `checkpointing`, and all but reward models `eval`.
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


def evaluation_of(config: JobConfig) -> EvalConfig | None:
    """Return the evaluation in the background of a training job; None without `eval.period`.

    It is what `nemo-rl eval` makes of the job's configuration, so both return the same scores of the same weights.

    Raises:
        ConfigError: a key in `eval.generation`, `eval.data` or `eval.env` is unknown, or the sections do not fit.
    """
    if isinstance(config, RewardModelJobConfig) or not config.eval.period:
        return None
    return validate(EvalConfig, from_training(config.model_dump(mode="json")), where="eval")
