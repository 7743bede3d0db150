"""Root of the configuration of a distillation job, with the section of the algorithm."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from nemo_rl.algorithms.config import LossConfig, OnPolicyConfig, OnPolicyJobConfig
from nemo_rl.algorithms.eval_config import BackgroundEvaluationConfig
from nemo_rl.data.config import DataConfig
from nemo_rl.distributed.config import ClusterConfig
from nemo_rl.environments.config import EnvironmentConfig
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.teacher.config import TeacherConfig
from nemo_rl.observability.logger_config import LoggerConfig
from nemo_rl.utils.checkpoint import CheckpointingConfig


class DistillationConfig(OnPolicyConfig):
    """Configures on-policy distillation."""

    objective: Literal["sampled", "top_k"] = Field(
        "sampled",
        description="Compare student and teacher at the sampled tokens, by a policy gradient, or at the teacher's "
        "top_k tokens, exactly.",
    )
    num_generations_per_prompt: int = Field(1, ge=1, description="Completions per problem.")
    top_k: int = Field(16, ge=1, description="Most probable tokens of the teacher. Only with objective=top_k.")
    beta: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Divergence with objective=top_k: 1 is the reverse and 0 the forward KL divergence, values between "
        "are the generalized Jensen-Shannon divergence.",
    )


class DistillationJobConfig(OnPolicyJobConfig):
    """Configures a distillation job.

    Example:
        >>> DistillationJobConfig().num_samples_per_step
        32
    """

    algorithm_key: ClassVar[str] = "distillation"

    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    env: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    checkpointing: CheckpointingConfig = Field(default_factory=CheckpointingConfig)
    eval: BackgroundEvaluationConfig = Field(default_factory=BackgroundEvaluationConfig)

    @property
    def teacher_shares_gpus(self) -> bool:
        """Whether the teacher takes turns with policy and generation on the same GPUs."""
        return self.shares_gpus and self.teacher.cluster is None

    @model_validator(mode="after")
    def _check_loss(self) -> DistillationJobConfig:
        if self.loss.recipe is not None:
            raise ValueError(
                f"loss.recipe={self.loss.recipe} sets keys of grpo, which distillation does not have; set the keys of "
                "loss themselves"
            )
        if self.loss.has_kl_in_reward:
            raise ValueError(
                f"loss.kl_placement={self.loss.kl_placement} puts the KL divergence into rewards, which distillation "
                "only measures; set loss.kl_placement=loss"
            )
        if self.distillation.objective == "top_k" and self.loss != LossConfig():
            raise ValueError(
                "the section loss is that of distillation.objective=sampled and has no effect with top_k; remove it, "
                "or set distillation.objective=sampled"
            )
        return self

    @model_validator(mode="after")
    def _check_backend(self) -> DistillationJobConfig:
        if self.distillation.objective == "top_k" and not self.policy.trains_top_k:
            raise ValueError(
                f"distillation.objective=top_k is not supported by policy.backend={self.policy.backend}; set "
                "distillation.objective=sampled, or another backend"
            )
        return self
