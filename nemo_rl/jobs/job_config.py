"""The configurations of all training jobs, and of the evaluation in their background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.eval_config import EvalConfig, from_training
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.utils.config import load_config, sections_of, validate

# They share the sections `policy`, `cluster`, `logger`, `checkpointing` and `eval`.
JobConfig: TypeAlias = MasterConfig | SFTJobConfig


def load_job_config(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Load the configuration of any training job: with a section `sft`, of supervised fine-tuning, else of GRPO.

    Raises:
        ConfigError: See `load_config`.
    """
    if "sft" in sections_of(path):
        return load_config(SFTJobConfig, path, overrides)
    return load_config(MasterConfig, path, overrides)


def evaluation_of(config: JobConfig) -> EvalConfig | None:
    """Return the evaluation in the background of a training job; None without `eval.period`.

    It is what `nemo-rl eval` makes of the job's configuration, so both return the same scores of the same weights.

    Raises:
        ConfigError: a key in `eval.generation`, `eval.data` or `eval.env` is unknown, or the sections do not fit.
    """
    if not config.eval.period:
        return None
    return validate(EvalConfig, from_training(config.model_dump(mode="json")), where="eval")
