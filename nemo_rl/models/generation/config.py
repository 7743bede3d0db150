"""The `policy.generation` section of a configuration."""

from __future__ import annotations

from pydantic import Field

from nemo_rl.utils.config import ConfigModel


class SamplingConfig(ConfigModel):
    """How the next token is drawn."""

    temperature: float = Field(1.0, gt=0, description="Softmax temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: smallest set of tokens with at least this probability.")
    top_k: int | None = Field(None, ge=1, description="Draw from the k likeliest tokens only. Null: all.")


class GenerationConfig(SamplingConfig):
    """Who generates completions, and how."""

    backend: str = Field("torch", description="A name in nemo_rl.models.generation.registry.BACKENDS.")
    max_new_tokens: int = Field(32, ge=1, description="Longest completion in tokens.")
    stop_strings: list[str] = Field(default=[], description="Texts that end a completion; they are kept in it.")
    stop_token_ids: list[int] = Field(default=[], description="Tokens that end a completion, besides end-of-sequence.")
    precision: str | None = Field(None, description="float32 or bfloat16. Null: the policy's.")
    num_workers: int | None = Field(None, ge=1, description="Generation workers. Null: as many as policy workers.")
    num_threads: int | None = Field(
        None, ge=1, description="Torch threads of one worker on CPU. Null: its share of the CPUs."
    )
    max_batch_size: int = Field(1024, ge=1, description="Sequences decoded at a time by one worker.")
    validation: SamplingConfig | None = Field(None, description="Sampling for validation. Null: greedy.")
