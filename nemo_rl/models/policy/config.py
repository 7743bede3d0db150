"""The `policy` section of a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from nemo_rl.models.backends import POLICY_BACKENDS, policy_backend
from nemo_rl.models.generation.config import GenerationConfig, GeneratorSpec
from nemo_rl.utils.config import ConfigModel, OpenSection

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nemo_rl.distributed.named_sharding import NamedSharding

EMBEDDED_MODEL = "embedded"
EMBEDDED_CHAT_MODEL = "embedded-chat"
EMBEDDED_MODELS = (EMBEDDED_MODEL, EMBEDDED_CHAT_MODEL)
DATA_PARALLEL = "data_parallel"


class PolicyOptions(OpenSection):
    """The options of one policy backend; a subclass adds keys.

    Without options, every worker holds the whole model and is one data-parallel rank.
    """

    def layout(self, num_workers: int) -> NamedSharding:
        """Place the ranks on named axes. One axis must be `DATA_PARALLEL`; batches are replicated along all others.

        Raises:
            ConfigError: the options do not divide `num_workers`.
        """
        from nemo_rl.distributed.named_sharding import NamedSharding

        return NamedSharding(list(range(num_workers)), [DATA_PARALLEL])

    def check(self, policy: PolicyConfig) -> None:
        """Raise `ConfigError` for settings of `policy` that this backend does not support."""

    def check_model(self, model: PretrainedConfig, policy: PolicyConfig) -> None:
        """Raise `ModelError` for a model that this backend does not support, or cannot divide as configured.

        The driver calls this as soon as it has read the model's configuration, before any venv is built.
        """

    def training_bytes(self, policy: PolicyConfig, num_parameters: int, num_workers: int) -> int:
        """Estimate the bytes of weights, gradients and AdamW state in one worker, without activations."""
        # AdamW keeps two float32 moments besides the float32 master weight and its gradient.
        bytes_per_parameter = 16 if policy.lora is None else 4  # adapters are small
        return num_parameters * bytes_per_parameter // (num_workers if policy.sharding == "fsdp" else 1)

    @classmethod
    def variants(cls) -> Iterable[tuple[str, type[ConfigModel]]]:
        return [
            (f"policy.backend={name}", backend.options_class(PolicyOptions))
            for name, backend in POLICY_BACKENDS.items()
        ]


class EmbeddedModelConfig(ConfigModel):
    """The tiny Llamas that the project trains itself: `policy.model_name: embedded` or `embedded-chat`."""

    hidden_size: int = Field(128, ge=8, description="Width of the model.")
    num_layers: int = Field(2, ge=1, description="Transformer layers.")
    num_attention_heads: int = Field(4, ge=1, description="Attention heads.")
    seed: int = Field(0, description="Seed of the initial weights and of the warm-up.")
    warmup_accuracy: float = Field(
        0.2, gt=0, le=1, description="The supervised warm-up ends at this accuracy on train problems."
    )
    warmup_steps: int = Field(1000, ge=0, description="Maximum steps of the supervised warm-up.")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> EmbeddedModelConfig:
        if self.hidden_size % (2 * self.num_attention_heads):  # rotary embeddings rotate pairs of dimensions
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be num_attention_heads ({self.num_attention_heads}) times an "
                "even number"
            )
        return self


class OptimizerConfig(ConfigModel):
    """The AdamW optimizer."""

    lr: float = Field(1e-6, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay rates of the moment estimates.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")

    @field_validator("betas")
    @classmethod
    def _moments_decay(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= rate < 1 for rate in value):
            raise ValueError("both decay rates must be at least 0 and less than 1")
        return value


class SchedulerConfig(ConfigModel):
    """The learning-rate schedule, in optimizer steps."""

    kind: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    total_steps: int | None = Field(
        None, ge=1, description="Steps until min_lr_ratio. Null: all optimizer steps of the job."
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Final learning rate as a share of the peak.")


class BatchingConfig(ConfigModel):
    """Limits micro-batches by samples or by tokens."""

    mode: Literal["fixed", "dynamic", "packed"] = Field(
        "fixed",
        description="fixed: by sample count; dynamic: similar lengths together, padded; packed: sequences in one row.",
    )
    max_tokens: int = Field(8192, ge=1, description="Maximum tokens of a micro-batch in the modes dynamic and packed.")
    length_multiple: int = Field(1, ge=1, description="Micro-batch lengths are rounded up to a multiple of this.")


class LoraConfig(ConfigModel):
    """LoRA: low-rank adapters are trained instead of the model's weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(32, ge=1, description="Adapters are scaled by alpha / rank.")
    scale_by_sqrt_rank: bool = Field(
        False, description="Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."
    )
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Names of the linear layers with adapters, such as q_proj; all-linear: all but the output layer.",
    )
    seed: int = Field(0, description="Seed of the adapters' initial values.")
    sync: Literal["adapter", "merged"] | None = Field(
        None,
        description="Send generation the adapters only, and the base weights once, or all weights, merged. Null: "
        "adapter, but merged if weights go from GPU to GPU or the generation backend cannot load adapters.",
    )

    @field_validator("target_modules")
    @classmethod
    def _some_modules(cls, value: Literal["all-linear"] | list[str]) -> Literal["all-linear"] | list[str]:
        if not value:
            raise ValueError("name at least one linear layer, such as q_proj, or all-linear")
        return value


class PolicyConfig(ConfigModel):
    """The model to train, its optimizer and its workers."""

    model_name: str = Field(
        EMBEDDED_MODEL, description="Hugging Face directory or hub name, `embedded`, or `embedded-chat`."
    )
    tokenizer_name: str | None = Field(None, description="Hugging Face directory or hub name. Null: model_name.")
    embedded: EmbeddedModelConfig = Field(default_factory=EmbeddedModelConfig)
    backend: str = Field("torch", description="A name in nemo_rl.models.backends.POLICY_BACKENDS.")
    options: SerializeAsAny[PolicyOptions] = Field(
        default_factory=PolicyOptions, description="Options of this backend."
    )
    py_executable: str | None = Field(None, description="Python of the workers. Null: the registered one.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Compute dtype; master weights are float32."
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters. Null: train all weights.")
    sharding: Literal["ddp", "fsdp"] = Field(
        "ddp", description="Replicate the model on every worker, or shard it (FSDP2)."
    )
    num_threads: int | None = Field(
        None, ge=1, description="Torch threads of one worker on CPUs. Null: an equal share of the node's CPUs."
    )
    attn_implementation: str = Field(
        "sdpa", description="Attention kernel of transformers: sdpa, eager, flash_attention_2."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    max_sequence_length: int = Field(128, ge=2, description="Longest prompt plus completion in tokens.")
    train_global_batch_size: int | None = Field(
        None, ge=1, description="Samples per optimizer step, over all workers. Null: all samples of a step."
    )
    train_micro_batch_size: int = Field(64, ge=1, description="Samples per forward and backward pass of one worker.")
    logprob_batch_size: int = Field(256, ge=1, description="Samples per forward pass for log-probabilities.")
    batching: BatchingConfig = Field(default_factory=BatchingConfig)
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the gradient's global L2 norm. Null: do not clip.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    offload: bool | None = Field(
        None,
        description="During generation, keep weights and optimizer state in host memory and drop gradients. "
        "Null: if policy and generation share GPUs and generation sleeps while the policy trains.",
    )
    weight_transport: str = Field(
        "auto",
        description="Transport of weights to generation: a name in nemo_rl.models.weights.transports.TRANSPORTS. "
        "`auto` chooses by the placement of the workers.",
    )
    weight_bucket_mib: int = Field(256, ge=1, description="Weights are published in buckets of this size, in MiB.")
    weight_stream_bucket_mib: int | None = Field(
        None,
        ge=1,
        description="With synchronous training, weights are streamed in buckets of this size, in MiB. Null: 8 on CPUs "
        "of one node (they stay in the processor's cache on their way), 128 elsewhere.",
    )

    is_reward_model: ClassVar[bool] = False

    @property
    def weight_stream_bucket_bytes(self) -> int | None:
        """`weight_stream_bucket_mib` in bytes."""
        return None if self.weight_stream_bucket_mib is None else self.weight_stream_bucket_mib << 20

    @field_validator("options", mode="before")
    @classmethod
    def _options_of_backend(cls, value: Any, info: ValidationInfo) -> PolicyOptions:
        if "backend" not in info.data:  # already rejected
            return PolicyOptions()
        return policy_backend(info.data["backend"]).check_options(value, PolicyOptions, key="policy.options")

    @model_validator(mode="after")
    def _options_fit(self) -> PolicyConfig:
        self.options.check(self)
        if self.lora is not None and not policy_backend(self.backend).trains_lora:
            raise ValueError(f"policy.lora is not supported by policy.backend={self.backend}")
        if self.offload and not policy_backend(self.backend).offloads:
            raise ValueError(f"policy.offload=true is not supported by policy.backend={self.backend}")
        if self.generation.router_replay and not policy_backend(self.backend).replays_experts:
            raise ValueError(
                f"policy.generation.router_replay=true is not supported by policy.backend={self.backend}: set it to "
                "false"
            )
        return self

    @property
    def trains_top_k(self) -> bool:
        """Whether a loss can get the log-probabilities of `top_ids`; see `LossFunction`."""
        return policy_backend(self.backend).trains_top_k

    def generator_spec(self, model_name: str, *, use_gpus: bool) -> GeneratorSpec:
        """Return what the generators of this policy are made from.

        Args:
            model_name: Hugging Face directory or hub name.
            use_gpus: whether they run on GPUs.
        """
        return GeneratorSpec(
            model_name,
            self.generation,
            self.max_sequence_length,
            tokenizer_name=self.tokenizer_name,
            default_precision=self.precision,
            use_gpu=use_gpus,
        )

    def offloads(self, *, shares_gpus: bool) -> bool:
        """Whether the policy frees its devices during generation.

        Args:
            shares_gpus: whether policy and generation use the same GPUs in turns.
        """
        if self.offload is not None:
            return self.offload
        return shares_gpus and self.generation.options.sleeps and policy_backend(self.backend).offloads


class RewardPolicyConfig(PolicyConfig):
    """A policy section whose model computes a reward for each conversation instead of probabilities of tokens."""

    is_reward_model = True

    @model_validator(mode="after")
    def _reward_model_is_supported(self) -> RewardPolicyConfig:
        if not policy_backend(self.backend).trains_reward_models:
            names = ", ".join(name for name, backend in POLICY_BACKENDS.items() if backend.trains_reward_models)
            raise ValueError(f"policy.backend={self.backend} does not train reward models; set it to one of: {names}")
        if self.lora is not None:
            raise ValueError("policy.lora is not supported for reward models; set it to null")
        return self
