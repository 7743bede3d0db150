"""The root of a GRPO job's configuration, and the sections that belong to the algorithm and to the run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nemo_rl.data.config import DataConfig
from nemo_rl.distributed.config import ClusterConfig
from nemo_rl.environments.config import EnvironmentConfig
from nemo_rl.models.policy.config import DATA_PARALLEL, PolicyConfig
from nemo_rl.observability.logger_config import LoggerConfig
from nemo_rl.utils.checkpoint import CheckpointingConfig
from nemo_rl.utils.config import ConfigModel


class AdvantageConfig(ConfigModel):
    """Rewards to advantages, within the group of one prompt."""

    baseline: Literal["leave_one_out", "mean"] = Field("leave_one_out", description="What is subtracted from a reward.")
    normalize_std: bool = Field(True, description="Divide by the standard deviation of the group's rewards.")


class LossConfig(ConfigModel):
    """The clipped surrogate and its extras."""

    clip_ratio_low: float = Field(0.2, ge=0, lt=1, description="The ratio is clipped below 1 - this.")
    clip_ratio_high: float = Field(0.2, ge=0, description="The ratio is clipped above 1 + this.")
    dual_clip: float | None = Field(None, gt=1, description="Bound of the ratio for negative advantages. Null: off.")
    aggregation: Literal["token", "sequence"] = Field(
        "token", description="Mean over all tokens, or over samples' means."
    )
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL divergence to the reference policy; 0 loads none.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of the KL divergence.")
    importance_correction: Literal["none", "token", "sequence"] = Field(
        "token", description="Weight by policy over generation probability, per token or per sequence."
    )
    importance_cap: float | None = Field(2.0, gt=0, description="Truncate that weight here. Null: do not.")


class DynamicSamplingConfig(ConfigModel):
    """Groups whose rewards are all equal teach nothing: draw further prompts until the batch is full."""

    enabled: bool = Field(False, description="Replace groups with zero reward variance.")
    max_generation_batches: int = Field(10, ge=1, description="Rollouts per step before the step takes what there is.")


class EarlyStopConfig(ConfigModel):
    """Stop when a validation metric is good enough."""

    metric: str = Field("val/accuracy", description="A key of the validation record.")
    threshold: float = Field(0.97, description="Stop once the metric is at least this.")


class ValidationConfig(ConfigModel):
    """When and how the policy is validated."""

    period: int = Field(10, ge=0, description="Validate every N steps; 0: only at start and end, as set below.")
    at_start: bool = Field(True, description="Validate before the first step.")
    at_end: bool = Field(True, description="Validate after the last step.")
    max_num_problems: int = Field(256, ge=1, description="Validation problems used.")
    num_generations: int = Field(
        1, ge=1, description="Completions per problem; pass@k is reported for k = 1, 2, 4, ... up to this."
    )


class LogprobCheckConfig(ConfigModel):
    """Training and generation must agree on log-probabilities, or the gradient is wrong."""

    period: int = Field(10, ge=1, description="Compare at step 1 and then every N steps.")
    max_mean_error: float = Field(0.02, gt=0, description="Bound of the mean absolute difference per token, in nats.")


class GRPOConfig(ConfigModel):
    """Group relative policy optimisation."""

    seed: int = Field(42, ge=0, description="Seed of everything random in the run.")
    max_num_steps: int = Field(100, ge=1, description="Training steps.")
    max_num_epochs: int | None = Field(None, ge=1, description="Stop after this many passes over the train data.")
    max_time_s: float | None = Field(None, gt=0, description="Stop after this many seconds of training.")
    num_prompts_per_step: int = Field(32, ge=1, description="Problems per step.")
    num_generations_per_prompt: int = Field(8, ge=1, description="Completions per problem.")
    num_updates_per_step: int = Field(1, ge=1, description="Passes over a step's samples.")
    max_trajectory_age: int = Field(
        0,
        ge=0,
        description="Rollouts made ahead while the policy trains, with weights that lag so many steps. 0: synchronous.",
    )
    in_flight_weight_updates: bool = Field(
        False,
        description="With rollouts ahead: new weights reach a rollout under way. Such runs do not repeat exactly.",
    )
    stream_rollouts: bool = Field(
        False,
        description="Judge a problem's completions while others are generated, where the generation backend streams.",
    )
    overlong_filtering: bool = Field(False, description="Leave completions that hit the length limit out of the loss.")
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    dynamic_sampling: DynamicSamplingConfig = Field(default_factory=DynamicSamplingConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    early_stop: EarlyStopConfig | None = Field(None, description="Null: run all steps.")
    logprob_check: LogprobCheckConfig = Field(default_factory=LogprobCheckConfig)

    @model_validator(mode="after")
    def _group_large_enough(self) -> GRPOConfig:
        if self.advantage.baseline == "leave_one_out" and self.num_generations_per_prompt < 2:
            raise ValueError("advantage.baseline=leave_one_out needs num_generations_per_prompt of at least 2")
        return self

    @model_validator(mode="after")
    def _something_is_in_flight(self) -> GRPOConfig:
        if self.in_flight_weight_updates and not self.max_trajectory_age:
            raise ValueError(
                "in_flight_weight_updates=true needs max_trajectory_age of at least 1: without it no rollout is under "
                "way when weights change"
            )
        return self


class MasterConfig(ConfigModel):
    """A whole GRPO job."""

    grpo: GRPOConfig = Field(default_factory=GRPOConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    env: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    checkpointing: CheckpointingConfig = Field(default_factory=CheckpointingConfig)

    @property
    def num_samples_per_step(self) -> int:
        """Completions of one training step."""
        return self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, as far as the configuration decides it."""
        per_update = self.policy.train_global_batch_size or self.num_samples_per_step
        return self.grpo.max_num_steps * self.grpo.num_updates_per_step * (self.num_samples_per_step // per_update)

    @property
    def shares_gpus(self) -> bool:
        """Whether policy and generation take turns on the same GPUs."""
        return self.cluster.use_gpus and self.cluster.generation is None and self.grpo.max_trajectory_age == 0

    @model_validator(mode="after")
    def _turns_are_taken(self) -> MasterConfig:
        if self.policy.offload and self.grpo.max_trajectory_age:
            raise ValueError(
                f"policy.offload=true: with grpo.max_trajectory_age={self.grpo.max_trajectory_age} the policy trains "
                "while generation works, and must stay where it is"
            )
        return self

    @model_validator(mode="after")
    def _lag_is_corrected(self) -> MasterConfig:
        if self.grpo.max_trajectory_age and self.loss.importance_correction == "none":
            raise ValueError(
                f"grpo.max_trajectory_age={self.grpo.max_trajectory_age} trains on completions of older weights, which "
                "needs loss.importance_correction=token or sequence"
            )
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> MasterConfig:
        prompt, new = self.data.max_prompt_length, self.policy.generation.max_new_tokens
        if prompt + new > self.policy.max_sequence_length:
            raise ValueError(
                f"data.max_prompt_length ({prompt}) + policy.generation.max_new_tokens ({new}) exceeds "
                f"policy.max_sequence_length ({self.policy.max_sequence_length})"
            )
        batching = self.policy.batching
        longest = -(-self.policy.max_sequence_length // batching.length_multiple) * batching.length_multiple
        if batching.mode != "fixed" and batching.max_tokens < longest:
            raise ValueError(
                f"policy.batching.max_tokens ({batching.max_tokens}) is less than one sequence of "
                f"policy.max_sequence_length ({longest} tokens, rounded up to policy.batching.length_multiple)"
            )
        samples = self.num_samples_per_step
        per_update = self.policy.train_global_batch_size or samples
        if samples % per_update:
            raise ValueError(
                f"grpo.num_prompts_per_step x grpo.num_generations_per_prompt ({samples}) is not a multiple of "
                f"policy.train_global_batch_size ({per_update})"
            )
        shards = self.policy.options.layout(self.cluster.num_workers).get_axis_size(DATA_PARALLEL)
        if per_update % shards:
            raise ValueError(
                f"{per_update} samples per optimizer step cannot be split evenly over {shards} data-parallel workers"
            )
        return self
