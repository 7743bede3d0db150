"""Root of the configuration of a job that trains a reward model, with the section of the algorithm."""

from __future__ import annotations

from pydantic import Field

from nemo_rl.algorithms.record_config import RecordCheckpointingConfig, RecordJobConfig, RecordTrainingConfig
from nemo_rl.data.config import PreferenceDataConfig
from nemo_rl.distributed.config import ClusterConfig
from nemo_rl.models.policy.config import EMBEDDED_CHAT_MODEL, RewardPolicyConfig
from nemo_rl.observability.logger_config import LoggerConfig


class RewardModelConfig(RecordTrainingConfig):
    """Configures the training of a reward model. A record is a pair."""

    centering: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Coefficient of the squared sum of both rewards, which keeps rewards around 0 (Eisenstein et al. "
        "2023).",
    )


class RewardModelPolicyConfig(RewardPolicyConfig):
    """The model to train, its optimizer and its workers. Generation does not run, so its keys have no effect."""

    model_name: str = Field(
        EMBEDDED_CHAT_MODEL,
        description="Hugging Face directory or hub name, `embedded`, or `embedded-chat`: a language model, or a reward "
        "model to continue.",
    )


class RewardModelJobConfig(RecordJobConfig):
    """Configures a job that trains a reward model.

    Example:
        >>> RewardModelJobConfig().num_samples_per_step  # 32 pairs
        64
    """

    section = "reward_model"
    rows_per_record = 2
    activity = "the training of a reward model"

    reward_model: RewardModelConfig = Field(default_factory=RewardModelConfig)
    policy: RewardModelPolicyConfig = Field(default_factory=RewardModelPolicyConfig)
    data: PreferenceDataConfig = Field(default_factory=PreferenceDataConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    checkpointing: RecordCheckpointingConfig = Field(default_factory=RecordCheckpointingConfig)
