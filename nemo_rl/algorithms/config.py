"""Root of the configuration of a GRPO job, with the sections of the algorithm.

`OnPolicyConfig` and `OnPolicyJobConfig` are what GRPO shares with other algorithms that train on the policy's samples.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from nemo_rl.algorithms.batch_sizes import check_batch_sizes, check_sample_length
from nemo_rl.algorithms.eval_config import BackgroundEvaluationConfig
from nemo_rl.algorithms.loss_recipes import LOSS_RECIPES, with_recipe
from nemo_rl.data.config import DataConfig
from nemo_rl.distributed.config import ClusterConfig
from nemo_rl.environments.config import EnvironmentConfig
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.observability.logger_config import LoggerConfig
from nemo_rl.utils.checkpoint import CheckpointingConfig
from nemo_rl.utils.config import ConfigModel


class AdvantageConfig(ConfigModel):
    """Configures how rewards become advantages within the group of one prompt."""

    baseline: Literal["leave_one_out", "mean", "none"] = Field(
        "leave_one_out", description="Baseline of the group that is subtracted from each reward."
    )
    normalize_std: bool = Field(True, description="Divide advantages by a standard deviation, see normalize_over.")
    normalize_over: Literal["group", "batch"] = Field(
        "group",
        description="Divide by the standard deviation of the group's rewards, or subtract the mean of the batch's "
        "advantages and divide by their standard deviation.",
    )

    level: Literal["episode", "turn"] = Field(
        "episode",
        description="One advantage for all tokens of an episode, or one for each turn, from the rewards of this turn "
        "and of later ones.",
    )
    discount: float = Field(
        1.0, ge=0, le=1, description="Factor per turn for the rewards of later turns, with level=turn."
    )


class OverlongPenaltyConfig(ConfigModel):
    """Configures the soft penalty on long completions of DAPO."""

    buffer_tokens: int | None = Field(
        None,
        ge=1,
        description="The penalty begins this many tokens before policy.generation.max_new_tokens and grows linearly. "
        "Null: a fifth of it.",
    )
    factor: float = Field(1.0, gt=0, description="Penalty at the limit, subtracted from the reward.")


class LossConfig(ConfigModel):
    """Configures the policy-gradient loss, its KL term and the importance correction."""

    recipe: Literal[tuple(LOSS_RECIPES)] | None = Field(  # type: ignore[valid-type]
        None, description="Named combination of keys, such as dapo; keys that are given override it. See grpo.md."
    )
    objective: Literal["clip", "gspo", "cispo", "reinforce"] = Field("clip", description="Surrogate of the loss.")
    clip_ratio_low: float = Field(
        0.2, ge=0, le=1, description="Clip the policy ratio from below at 1 - clip_ratio_low."
    )
    clip_ratio_high: float = Field(0.2, ge=0, description="Clip the policy ratio from above at 1 + clip_ratio_high.")
    dual_clip: float | None = Field(
        None, gt=1, description="Bound of the ratio for negative advantages. Null disables it."
    )
    aggregation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="Average over all tokens, over the means of the samples, or over the samples' sums divided by "
        "constant_length.",
    )
    constant_length: int | None = Field(
        None, ge=1, description="Divisor for aggregation=constant. Null: policy.generation.max_new_tokens."
    )
    kl_coef: float = Field(
        0.0, ge=0, description="Weight of the KL divergence to the reference policy. 0 loads no reference policy."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of the KL divergence.")
    kl_placement: Literal["loss", "reward", "reward_to_go"] = Field(
        "loss",
        description="Add the KL divergence to the loss, subtract a completion's sum from its reward, or subtract from "
        "each token's advantage the sum over the tokens from it on.",
    )
    kl_weighted: bool = Field(
        False, description="Multiply KL estimates in the loss by the policy ratio, which makes their gradient unbiased."
    )
    importance_correction: Literal["none", "token", "sequence"] = Field(
        "token", description="Weight losses by policy over generation probability, per token or per sequence."
    )
    importance_cap: float | None = Field(2.0, gt=0, description="Upper bound of importance weights. Null: none.")
    importance_floor: float | None = Field(None, ge=0, description="Lower bound of importance weights. Null: none.")
    importance_outside: Literal["truncate", "mask"] = Field(
        "truncate", description="A weight outside the bounds becomes the bound, or 0."
    )

    @property
    def has_kl_in_reward(self) -> bool:
        """Whether the KL divergence counts in the reward or the advantages, not in the loss."""
        return self.kl_coef > 0 and self.kl_placement != "loss"

    @model_validator(mode="after")
    def _check_combination(self) -> LossConfig:
        if self.dual_clip is not None and self.objective in ("cispo", "reinforce"):
            raise ValueError(f"dual_clip has no effect with objective={self.objective}; set it to null")
        if self.importance_floor is not None and self.importance_floor > (self.importance_cap or math.inf):
            raise ValueError(
                f"importance_floor={self.importance_floor:g} is above importance_cap={self.importance_cap:g}"
            )
        return self


class DynamicSamplingConfig(ConfigModel):
    """Replaces groups whose rewards are all equal, which have no gradient, until the batch is full."""

    enabled: bool = Field(False, description="Replace groups with zero reward variance.")
    max_generation_batches: int = Field(
        10, ge=1, description="Maximum rollouts per step. The step then trains on the groups that exist."
    )


class EarlyStopConfig(ConfigModel):
    """Stops the run when a validation metric reaches a threshold."""

    metric: str = Field("val/accuracy", description="Name of the validation metric.")
    threshold: float = Field(0.97, description="Stop once the metric is at least this.")


class ValidationConfig(ConfigModel):
    """Configures when and how the policy is validated."""

    period: int = Field(
        10, ge=0, description="Validate every N steps. 0 validates only at start and end, as configured."
    )
    at_start: bool = Field(True, description="Validate before the first step.")
    at_end: bool = Field(True, description="Validate after the last step.")
    max_num_problems: int = Field(256, ge=1, description="Number of validation problems.")
    num_generations: int = Field(
        1, ge=1, description="Completions per problem; pass@k is reported for k = 1, 2, 4, ... up to this."
    )


class LogprobCheckConfig(ConfigModel):
    """Checks that training and generation compute the same log-probabilities; otherwise the gradient is wrong."""

    period: int = Field(10, ge=1, description="Compare at step 1 and every N steps.")
    max_mean_error: float = Field(0.02, gt=0, description="Maximum mean absolute difference per token, in nats.")


class OnPolicyConfig(ConfigModel):
    """Configures the training on samples of the policy: their number, their age, limits, checks and validation."""

    seed: int = Field(42, ge=0, description="Seed of all random numbers of the run.")
    max_num_steps: int = Field(100, ge=1, description="Training steps.")
    max_num_epochs: int | None = Field(None, ge=1, description="Stop after this many passes over the training data.")
    max_time_s: float | None = Field(None, gt=0, description="Stop after this many seconds of training.")
    num_prompts_per_step: int = Field(32, ge=1, description="Problems per step.")
    num_generations_per_prompt: int = Field(8, ge=1, description="Completions per problem.")
    num_updates_per_step: int = Field(1, ge=1, description="Passes over the samples of a step.")
    max_trajectory_age: int = Field(
        0,
        ge=0,
        description="Maximum age in steps of the weights of a rollout. Above 0, rollouts run while the policy trains.",
    )
    in_flight_weight_updates: bool = Field(
        False,
        description="Load new weights while a rollout is running. Such runs are not exactly reproducible.",
    )
    stream_rollouts: bool = Field(
        False,
        description="Grade the completions of a problem while others are generated, if the generation backend streams.",
    )
    overlong_filtering: bool = Field(False, description="Exclude completions that hit the length limit from the loss.")
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    early_stop: EarlyStopConfig | None = Field(None, description="Early stopping. Null runs all steps.")
    logprob_check: LogprobCheckConfig = Field(default_factory=LogprobCheckConfig)

    @property
    def max_rollouts_per_step(self) -> int:
        """Rollouts of a step, above 1 if groups without a learning signal are replaced."""
        return 1

    @model_validator(mode="after")
    def _check_in_flight_updates(self) -> OnPolicyConfig:
        if self.in_flight_weight_updates and not self.max_trajectory_age:
            raise ValueError(
                "in_flight_weight_updates=true needs max_trajectory_age of at least 1: with 0, no rollout is running "
                "when the weights change"
            )
        return self


class GRPOConfig(OnPolicyConfig):
    """Configures group relative policy optimisation (GRPO)."""

    overlong_penalty: OverlongPenaltyConfig | None = Field(None, description="Soft penalty on length. Null: none.")
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    dynamic_sampling: DynamicSamplingConfig = Field(default_factory=DynamicSamplingConfig)

    @property
    def max_rollouts_per_step(self) -> int:
        """See `OnPolicyConfig`."""
        return self.dynamic_sampling.max_generation_batches if self.dynamic_sampling.enabled else 1

    @model_validator(mode="after")
    def _check_group_size(self) -> GRPOConfig:
        if self.advantage.baseline == "leave_one_out" and self.num_generations_per_prompt < 2:
            raise ValueError("advantage.baseline=leave_one_out needs num_generations_per_prompt of at least 2")
        return self


class OnPolicyJobConfig(ConfigModel):
    """The root of a job that trains on the policy's samples.

    Attributes:
        algorithm_key: name of the algorithm's section.
    """

    algorithm_key: ClassVar[str]

    if TYPE_CHECKING:  # each root declares the sections itself, in the order of its help
        loss: LossConfig
        policy: PolicyConfig
        data: DataConfig
        env: EnvironmentConfig
        cluster: ClusterConfig
        logger: LoggerConfig
        checkpointing: CheckpointingConfig
        eval: BackgroundEvaluationConfig

    @property
    def algorithm(self) -> OnPolicyConfig:
        """The section of the algorithm."""
        section: OnPolicyConfig = getattr(self, self.algorithm_key)
        return section

    @property
    def num_samples_per_step(self) -> int:
        """Number of completions in one training step."""
        return self.algorithm.num_prompts_per_step * self.algorithm.num_generations_per_prompt

    @property
    def resolved_loss(self) -> LossConfig:
        """The section `loss` with the default of `constant_length`, which depends on the length of completions."""
        length = self.loss.constant_length or self.policy.generation.max_new_tokens
        return self.loss.model_copy(update={"constant_length": length})

    @property
    def num_optimizer_steps(self) -> int:
        """Maximum number of optimizer steps of the run."""
        section, per_update = self.algorithm, self.policy.train_global_batch_size or self.num_samples_per_step
        return section.max_num_steps * section.num_updates_per_step * (self.num_samples_per_step // per_update)

    @property
    def shares_gpus(self) -> bool:
        """Whether policy and generation take turns on the same GPUs."""
        return self.cluster.use_gpus and self.cluster.generation is None and self.algorithm.max_trajectory_age == 0

    @model_validator(mode="after")
    def _check_offload(self) -> OnPolicyJobConfig:
        age = self.algorithm.max_trajectory_age
        if self.policy.offload and age:
            raise ValueError(
                f"policy.offload=true: with {self.algorithm_key}.max_trajectory_age={age} the policy trains while "
                "generation runs, so it must keep its memory"
            )
        return self

    @model_validator(mode="after")
    def _check_importance_correction(self) -> OnPolicyJobConfig:
        age = self.algorithm.max_trajectory_age
        if age and self.loss.importance_correction == "none":
            raise ValueError(
                f"{self.algorithm_key}.max_trajectory_age={age} trains on completions of older weights and needs "
                "loss.importance_correction=token or sequence"
            )
        return self

    @model_validator(mode="after")
    def _check_router_replay(self) -> OnPolicyJobConfig:
        names = ", ".join(self.env.entries())
        if self.policy.generation.router_replay and names:
            raise ValueError(
                f"policy.generation.router_replay=true does not support environments with turns ({names}): set it to "
                "false"
            )
        return self

    @model_validator(mode="after")
    def _check_truncation(self) -> OnPolicyJobConfig:
        generation, correction = self.policy.generation, self.loss.importance_correction
        if generation.truncates and correction != "token":
            raise ValueError(
                f"policy.generation.top_p={generation.top_p:g} and top_k={generation.top_k} draw tokens from another "
                "distribution than the policy's; only the weights of loss.importance_correction=token correct that, "
                f"and it is {correction}. Set it to token, or policy.generation.top_p=1 and top_k=null"
            )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> OnPolicyJobConfig:
        policy = self.policy
        check_sample_length(self.data.max_prompt_length, policy.generation.max_new_tokens, policy.max_sequence_length)
        check_batch_sizes(
            self.policy,
            self.num_samples_per_step,
            self.cluster.num_workers,
            key=f"{self.algorithm_key}.num_prompts_per_step x {self.algorithm_key}.num_generations_per_prompt",
        )
        return self


class MasterConfig(OnPolicyJobConfig):
    """Configures a GRPO job.

    Example:
        >>> config = MasterConfig()
        >>> config.num_samples_per_step
        256
    """

    algorithm_key: ClassVar[str] = "grpo"

    grpo: GRPOConfig = Field(default_factory=GRPOConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    env: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    checkpointing: CheckpointingConfig = Field(default_factory=CheckpointingConfig)
    eval: BackgroundEvaluationConfig = Field(default_factory=BackgroundEvaluationConfig)

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        # A section made in Python has all keys; only those that were given override a recipe.
        plain = {
            name: section.model_dump(exclude_unset=True) if isinstance(section, GRPOConfig | LossConfig) else section
            for name, section in content.items()
        }
        return with_recipe(plain)

    @model_validator(mode="after")
    def _check_overlong_penalty(self) -> MasterConfig:
        penalty, limit = self.grpo.overlong_penalty, self.policy.generation.max_new_tokens
        if penalty is not None and (penalty.buffer_tokens or 1) > limit:
            raise ValueError(
                f"grpo.overlong_penalty.buffer_tokens={penalty.buffer_tokens} exceeds "
                f"policy.generation.max_new_tokens={limit}"
            )
        return self

    @model_validator(mode="after")
    def _check_environments(self) -> MasterConfig:
        with_turns = bool(self.env.entries())
        if self.grpo.advantage.level == "turn":
            if not with_turns:
                raise ValueError("grpo.advantage.level=turn needs environments with turns: env.<name>.class")
            if self.loss.has_kl_in_reward:
                raise ValueError(
                    f"grpo.advantage.level=turn needs loss.kl_placement=loss, and it is {self.loss.kl_placement}"
                )
        if with_turns and self.grpo.overlong_penalty is not None:
            raise ValueError(
                "grpo.overlong_penalty is for completions with one turn; environments with turns have "
                "env.<name>.max_tokens and env.<name>.truncated"
            )
        return self
