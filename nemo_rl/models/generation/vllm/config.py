"""The options of the vLLM backend: `policy.generation.options` with `policy.generation.backend: vllm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from nemo_rl.errors import ModelError
from nemo_rl.models.generation.config import GenerationOptions, GeneratorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Streams that a worker runs at a time. Their rows share the engine's batches. In a simulation of 256 episodes with
# uneven steps and completions, rollouts took 44 s with one, 30 s with 4, 28 s with 8 and 27 s without a limit.
MAX_CONCURRENT_CALLS = 8
# Head sizes of vLLM's attention on CPUs, in the version that uv.lock installs. (On GPUs, one of its kernels supports
# any size.)
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


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
    def max_concurrent_calls(self) -> int:
        return MAX_CONCURRENT_CALLS if self.tensor_parallel_size == 1 else 1

    @property
    def sleeps(self) -> bool:
        return self.enable_sleep_mode

    def check_model(self, model: PretrainedConfig, spec: GeneratorSpec) -> None:
        sequences = self.max_num_seqs or spec.config.max_batch_size
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
                f"{spec.model_name!r}, and divide its {groups} key-value heads or be a multiple of them"
            )
        head_size = attention_head_size(text)
        if spec.use_gpu or head_size is None:
            return
        # Another Python may have another version of vLLM, whose workers check this.
        if spec.config.py_executable is None and head_size not in CPU_HEAD_SIZES:
            raise ModelError(
                f"{spec.model_name!r} has attention heads of size {head_size}; on CPUs, vLLM supports "
                f"{', '.join(map(str, CPU_HEAD_SIZES))}. Set policy.generation.backend=torch"
            )
        if not getattr(text, "sliding_window", None):
            bytes_per_number = {"float32": 4, "bfloat16": 2}[spec.precision]
            numbers = 2 * text.num_hidden_layers * max(1, groups // size) * head_size * spec.max_sequence_length
            gib = numbers * bytes_per_number / 2**30
            if gib > self.cpu_kv_cache_gib:
                raise ModelError(
                    f"policy.generation.options.cpu_kv_cache_gib={self.cpu_kv_cache_gib:g} is less than one sequence "
                    f"of {spec.max_sequence_length} tokens (policy.max_sequence_length) takes with "
                    f"{spec.model_name!r}: {gib:.3g} GiB"
                )


def attention_head_size(text: Any) -> int | None:
    """Return the size of an attention head; None if the keys are compressed (MLA) or the model has no attention."""
    heads = getattr(text, "num_attention_heads", None)
    if not heads or getattr(text, "kv_lora_rank", None):
        return None
    return getattr(text, "head_dim", None) or text.hidden_size // heads
