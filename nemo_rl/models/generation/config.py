"""The `policy.generation` section of a configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from nemo_rl.models.backends import GenerationOptions, check_options
from nemo_rl.models.generation.registry import generation_backend
from nemo_rl.utils.config import ConfigModel


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


class GenerationConfig(SamplingConfig):
    """The generation backend, its workers, and how completions are sampled."""

    backend: str = Field("torch", description="A name in nemo_rl.models.generation.registry.BACKENDS.")
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
        None, ge=1, description="Torch threads of one worker on CPU. Null: its share of the CPUs."
    )
    max_batch_size: int = Field(1024, ge=1, description="Sequences that one worker decodes at a time.")
    max_restarts: int = Field(
        2, ge=0, description="Restarts of dead generation workers before a further death ends the job."
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
        return check_options(generation_backend(info.data["backend"]), value, key="policy.generation.options")
