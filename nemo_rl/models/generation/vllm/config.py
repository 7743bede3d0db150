"""The options of the vLLM backend: `policy.generation.options` with `policy.generation.backend: vllm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from nemo_rl.errors import ModelError
from nemo_rl.models.generation.config import GenerationConfig, GenerationOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class VllmOptions(GenerationOptions):
    """Options of the vLLM engine. All of them are fixed when the engine starts."""

    tensor_parallel_size: int = Field(
        1, ge=1, description="Workers, each with its own GPU or CPUs, that hold one copy of the model together."
    )
    max_num_seqs: int | None = Field(
        None, ge=1, description="Sequences decoded at a time. Null: policy.generation.max_batch_size."
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Tokens of one forward pass, prompts included. Null: 8192, or max_num_seqs if larger."
    )
    enable_prefix_caching: bool = Field(True, description="Reuse the keys and values of common prompt prefixes.")
    enforce_eager: bool | None = Field(
        None,
        description="Run without CUDA graphs and compilation. Null: on CPUs only, where they take minutes.",
    )
    cpu_kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of one worker on CPUs, in GiB.")
    gpu_memory_utilization: float = Field(
        0.6, gt=0, le=1, description="Share of a GPU's memory for weights and KV cache, without the policy's memory."
    )
    enable_sleep_mode: bool = Field(
        True, description="On GPUs: release the memory while the policy trains on them. False: keep it."
    )
    http_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Serve vLLM's OpenAI-compatible API on loopback. Each worker of a node takes one port, starting "
        "with this one. 0: free ports. attestation.json lists addresses and token files. Null: no server.",
    )

    @model_validator(mode="after")
    def _http_needs_the_full_model(self) -> VllmOptions:
        if self.http_port is not None and self.tensor_parallel_size > 1:
            raise ValueError("http_port needs tensor_parallel_size=1: an HTTP request would reach only one rank")
        return self

    @property
    def workers_per_replica(self) -> int:
        return self.tensor_parallel_size

    @property
    def sleeps(self) -> bool:
        return self.enable_sleep_mode

    def check_model(self, model: PretrainedConfig, model_name: str, generation: GenerationConfig) -> None:
        sequences = self.max_num_seqs or generation.max_batch_size
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < sequences:
            raise ModelError(
                f"policy.generation.options.max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs, which is {sequences} (null: policy.generation.max_batch_size)"
            )
        size, text = self.tensor_parallel_size, model.get_text_config()
        heads = getattr(text, "num_attention_heads", size)  # vLLM checks models of other kinds
        groups = getattr(text, "num_key_value_heads", None) or heads
        if heads % size or (groups % size and size % groups):
            raise ModelError(
                f"policy.generation.options.tensor_parallel_size={size} must divide the {heads} attention heads of "
                f"{model_name!r}, and divide its {groups} key-value heads or be a multiple of them"
            )
