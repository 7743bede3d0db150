"""Root of the configuration of a job for direct preference optimization, with the section of the algorithm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nemo_rl.algorithms.eval_config import BackgroundEvaluationConfig
from nemo_rl.algorithms.record_config import (
    RecordCheckpointingConfig,
    RecordJobConfig,
    RecordPolicyConfig,
    RecordTrainingConfig,
)
from nemo_rl.data.config import PreferenceDataConfig
from nemo_rl.distributed.config import ClusterConfig
from nemo_rl.observability.logger_config import LoggerConfig


class DPOConfig(RecordTrainingConfig):
    """Configures direct preference optimization (DPO). A record is a pair."""

    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid",
        description="sigmoid: DPO (Rafailov et al. 2023); ipo: IPO (Azar et al. 2023) on means over the tokens of an "
        "answer.",
    )
    beta: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="Strength of the pull towards the reference policy; IPO's tau."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs that may be labeled the wrong way round (cDPO), for sigmoid."
    )

    @model_validator(mode="after")
    def _check_smoothing(self) -> DPOConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing has no meaning with loss={self.loss}; set it to 0, or loss to sigmoid")
        return self


class DPOJobConfig(RecordJobConfig):
    """Configures a job for direct preference optimization.

    Example:
        >>> DPOJobConfig().num_samples_per_step  # 32 pairs
        64
    """

    section = "dpo"
    rows_per_record = 2
    activity = "direct preference optimization"

    dpo: DPOConfig = Field(default_factory=DPOConfig)
    policy: RecordPolicyConfig = Field(default_factory=RecordPolicyConfig)
    data: PreferenceDataConfig = Field(default_factory=PreferenceDataConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    checkpointing: RecordCheckpointingConfig = Field(default_factory=RecordCheckpointingConfig)
    eval: BackgroundEvaluationConfig = Field(default_factory=BackgroundEvaluationConfig)
