"""Root of the configuration of a job for supervised fine-tuning, with the section of the algorithm."""

from __future__ import annotations

from pydantic import Field

from nemo_rl.algorithms.eval_config import BackgroundEvaluationConfig
from nemo_rl.algorithms.record_config import (
    RecordCheckpointingConfig,
    RecordJobConfig,
    RecordPolicyConfig,
    RecordTrainingConfig,
)
from nemo_rl.data.config import SFTDataConfig
from nemo_rl.distributed.config import ClusterConfig
from nemo_rl.observability.logger_config import LoggerConfig


class SFTConfig(RecordTrainingConfig):
    """Configures supervised fine-tuning (SFT)."""


class SFTJobConfig(RecordJobConfig):
    """Configures a job for supervised fine-tuning.

    Example:
        >>> SFTJobConfig().num_samples_per_step
        32
    """

    section = "sft"
    activity = "supervised fine-tuning"

    sft: SFTConfig = Field(default_factory=SFTConfig)
    policy: RecordPolicyConfig = Field(default_factory=RecordPolicyConfig)
    data: SFTDataConfig = Field(default_factory=SFTDataConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    checkpointing: RecordCheckpointingConfig = Field(default_factory=RecordCheckpointingConfig)
    eval: BackgroundEvaluationConfig = Field(default_factory=BackgroundEvaluationConfig)
