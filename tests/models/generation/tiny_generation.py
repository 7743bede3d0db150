"""Tiny models and helpers that the generation tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.models.weights.sender import publish

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda size: LlamaConfig(vocab_size=size, tie_word_embeddings=False, **_SHAPE),
    "llama-tied-bias": lambda size: LlamaConfig(
        vocab_size=size, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **_SHAPE
    ),
    "llama3-rope": lambda size: LlamaConfig(vocab_size=size, rope_parameters=_LLAMA3_ROPE, **_SHAPE),
    "qwen2": lambda size: Qwen2Config(vocab_size=size, tie_word_embeddings=True, **_SHAPE),
    "qwen3": lambda size: Qwen3Config(vocab_size=size, head_dim=16, **_SHAPE),
    # The window is shorter than most samples.
    "gemma3": lambda size: Gemma3TextConfig(
        vocab_size=size,
        head_dim=16,
        query_pre_attn_scalar=10,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        **_SHAPE,
    ),
    "qwen3_moe": lambda size: Qwen3MoeConfig(
        vocab_size=size, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, **_SHAPE
    ),
    "gpt2": lambda size: GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A model with random weights, and the directory of its configuration and tokenizer."""

    directory: Path
    model: PreTrainedModel
    tokenizer: Any

    def publish(self, version: int = 1, dtype: str = "float32", **options: Any) -> WeightUpdate:
        return publish(self.model.named_parameters(), version=version, dtype=dtype, transport="local", **options)

    def generator(self, *, loaded: bool = True, max_sequence_length: int = 64, **config: Any) -> TorchGenerator:
        generator = TorchGenerator(GeneratorSpec(str(self.directory), GenerationConfig(**config), max_sequence_length))
        if loaded:
            generator.update_weights(self.publish(dtype=generator.spec.precision))
        return generator

    def request(self, *texts: str, seed: int, **sampling: Any) -> GenerationRequest:
        return GenerationRequest(*self.prompts(*texts), seed=seed, **sampling)

    def prompts(self, *texts: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [self.tokenizer(text)["input_ids"] for text in texts]
        padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
        for row, tokens in zip(padded, ids, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return padded, torch.tensor([len(tokens) for tokens in ids])


def reference_logprobs(tiny: TinyModel, result: GenerationResult, temperature: float = 1.0) -> torch.Tensor:
    """Return the transformers model's log-probabilities of all completion tokens, row by row without padding."""
    logprobs = torch.zeros_like(result.logprobs)
    for row, (start, end) in enumerate(zip(result.prompt_lengths.tolist(), result.output_lengths.tolist())):
        ids = result.output_ids[row : row + 1, :end]
        with torch.no_grad():
            all_logprobs = (tiny.model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
        for position in range(start, end):
            logprobs[row, position] = all_logprobs[position - 1, ids[0, position]]
    return logprobs


def assert_same(result: GenerationResult, expected: GenerationResult) -> None:
    """Assert equal results up to the last bits of log-probabilities: matrix products round by batch size."""
    assert result.texts == expected.texts
    for field in ("output_ids", "output_lengths", "prompt_lengths", "truncated"):
        assert torch.equal(getattr(result, field), getattr(expected, field)), field
    for field in ("logprobs", "sampling_logprobs"):
        assert torch.allclose(getattr(result, field), getattr(expected, field), atol=1e-5), field
