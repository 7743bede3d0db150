"""The `policy.generation` section of a configuration, and what a generator is made from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from nemo_rl.errors import ModelError
from nemo_rl.models.backends import GENERATION_BACKENDS, generation_backend
from nemo_rl.utils.config import ConfigModel, OpenSection

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Families whose routers `models.routed_experts` knows.
_REPLAYED_FAMILIES = ("qwen3_moe",)


class GenerationOptions(OpenSection):
    """The options of one generation backend; a subclass adds keys."""

    @property
    def workers_per_replica(self) -> int:
        """Number of workers (bundles) that hold one copy of the model together."""
        return 1

    @property
    def max_concurrent_calls(self) -> int:
        """Number of streams that a worker runs at a time. If above 1, it has the method `stream_concurrently`."""
        return 1

    @property
    def sleeps(self) -> bool:
        """Whether `sleep` frees GPU memory."""
        return False

    def check_model(self, model: PretrainedConfig, spec: GeneratorSpec) -> None:
        """Raise `ModelError` for a model that this backend does not support, or cannot divide as configured.

        The driver calls this as soon as it has read the model's configuration, before any venv is built.

        Args:
            model: the configuration of the model.
            spec: what the generators will be made from.
        """
        if spec.config.router_replay and model.model_type not in _REPLAYED_FAMILIES:
            raise ModelError(
                f"policy.generation.router_replay=true supports {', '.join(_REPLAYED_FAMILIES)}, and "
                f"{spec.model_name!r} is of the family {model.model_type}: set it to false"
            )

    @classmethod
    def variants(cls) -> Iterable[tuple[str, type[ConfigModel]]]:
        return [
            (f"policy.generation.backend={name}", backend.options_class(GenerationOptions))
            for name, backend in GENERATION_BACKENDS.items()
        ]


class SamplingConfig(ConfigModel):
    """Temperature, top-p and top-k of the draws."""

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="Softmax temperature.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the smallest set of tokens with at least this probability (nucleus)."
    )
    top_k: int | None = Field(None, ge=1, description="Draw from the k likeliest tokens. Null: from all tokens.")

    @field_validator("temperature", mode="before")
    @classmethod
    def _is_not_zero(cls, value: Any) -> Any:
        if value == 0:
            raise ValueError(
                "temperature 0 is not supported; to validate greedily, set policy.generation.validation to null"
            )
        return value

    @field_validator("top_k", mode="before")
    @classmethod
    def _uses_null_for_all_tokens(cls, value: Any) -> Any:
        if value in (0, -1):
            raise ValueError("to draw from all tokens, set it to null")
        return value

    @property
    def truncates(self) -> bool:
        """Whether top-p or top-k excludes tokens from the draws."""
        return self.top_p < 1 or self.top_k is not None


class GenerationConfig(SamplingConfig):
    """The generation backend, its workers, and how completions are sampled."""

    backend: str = Field("torch", description="A name in nemo_rl.models.backends.GENERATION_BACKENDS.")
    options: SerializeAsAny[GenerationOptions] = Field(
        default_factory=GenerationOptions, description="Options of the chosen backend."
    )
    py_executable: str | None = Field(None, description="Python of the workers. Null: the registered one.")
    max_new_tokens: int = Field(32, ge=1, description="Longest completion in tokens.")
    stop_strings: list[str] = Field(
        default=[], description="Texts that end a completion; the completion includes them."
    )
    stop_token_ids: list[int] = Field(default=[], description="Tokens that end a completion, besides end-of-sequence.")
    precision: Literal["float32", "bfloat16"] | None = Field(
        None, description="Data type to generate in. Null: the policy's."
    )
    num_workers: int | None = Field(None, ge=1, description="Generation workers. Null: as many as policy workers.")
    num_threads: int | None = Field(
        None,
        ge=1,
        description="Torch threads of one worker on CPU. Null: its share of the CPUs. With at most 10 million "
        "parameters on the torch backend, each thread completes its own rows.",
    )
    max_batch_size: int = Field(1024, ge=1, description="Sequences that one worker decodes at a time.")
    max_restarts: int = Field(
        2, ge=0, description="Restarts of dead generation workers before a further death ends the job."
    )
    router_replay: bool = Field(
        False,
        description="Mixture of experts: train with the experts that generation chose. Only with torch generation.",
    )
    validation: SamplingConfig | None = Field(None, description="Sampling for validation. Null: greedy.")

    @field_validator("stop_strings")
    @classmethod
    def _stop_strings_are_not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty stop string would end every completion before its first token; remove it")
        return value

    @field_validator("stop_token_ids")
    @classmethod
    def _stop_tokens_are_tokens(cls, value: list[int]) -> list[int]:
        if any(token < 0 for token in value):
            raise ValueError("token ids must not be negative")
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _options_of_backend(cls, value: Any, info: ValidationInfo) -> GenerationOptions:
        if "backend" not in info.data:  # it was rejected
            return GenerationOptions()
        backend = generation_backend(info.data["backend"])
        return backend.check_options(value, GenerationOptions, key="policy.generation.options")

    @model_validator(mode="after")
    def _experts_are_returned(self) -> GenerationConfig:
        if self.router_replay and not generation_backend(self.backend).returns_experts:
            names = ", ".join(name for name, backend in GENERATION_BACKENDS.items() if backend.returns_experts)
            raise ValueError(
                f"policy.generation.router_replay=true is not supported by policy.generation.backend={self.backend}; "
                f"set the backend to {names}"
            )
        return self


@dataclass(frozen=True)
class GeneratorSpec:
    """Says which model a generator completes prompts with, and how.

    Attributes:
        model_name: Hugging Face directory or hub name.
        config: Sampling, stop conditions and the backend's options.
        max_sequence_length: Longest prompt plus completion, in tokens.
        tokenizer_name: Where the tokenizer comes from. None: the model's own.
        default_precision: "float32" or "bfloat16", unless `config.precision` is set.
        use_gpu: Compute on the GPU that the process sees.
        name: Name of the generator in messages.
    """

    model_name: str
    config: GenerationConfig
    max_sequence_length: int
    tokenizer_name: str | None = None
    default_precision: str = "float32"
    use_gpu: bool = False
    name: str = "the generator"

    @property
    def precision(self) -> str:
        """Data type to compute in: "float32" or "bfloat16"."""
        return self.config.precision or self.default_precision

    @property
    def device(self) -> str:
        """Device to compute on, as torch names it."""
        return "cuda" if self.use_gpu else "cpu"
