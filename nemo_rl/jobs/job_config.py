"""The configurations of all training jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.utils.config import load_config, sections_of

# They share the sections `policy`, `cluster`, `logger` and `checkpointing`.
JobConfig: TypeAlias = MasterConfig | SFTJobConfig


def load_job_config(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Load the configuration of any training job: with a section `sft`, of supervised fine-tuning, else of GRPO.

    Raises:
        ConfigError: See `load_config`.
    """
    if "sft" in sections_of(path):
        return load_config(SFTJobConfig, path, overrides)
    return load_config(MasterConfig, path, overrides)
