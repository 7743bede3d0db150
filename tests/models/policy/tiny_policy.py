"""Tiny models, a batch and a loss for the tests of policies. Other processes can import this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy.config import BatchingConfig, PolicyConfig
from nemo_rl.models.policy.microbatching import sharding_args
from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker

VOCABULARY = 29
PAIRS = 6
# With a smaller eps, AdamW's first steps are signs of gradients, even of gradients that are only rounding errors.
EPS = 1e-4


def make_llama(directory: Path, *, tied: bool = False, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_dropout=0.3,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


# Dense families, which support the same layouts.
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "gemma3_text": Gemma3TextConfig,
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
CONFIGS = {**FAMILIES, "qwen3_moe": Qwen3MoeConfig}
# What a family has besides the sizes that all families share. Windows are shorter than the samples of `make_batch`.
_FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 5,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    },
}


def make_model(directory: Path, family: str, *, tied: bool = False, seed: int = 0, **config: Any) -> Path:
    """Save a random model of a family with two key-value heads and random biases and norms."""
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        **_FAMILY_CONFIG.get(family, {}),
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**(defaults | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def make_moe(directory: Path, **config: Any) -> Path:
    """Save a random Qwen3-MoE model; every token is routed to two of eight experts."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return make_model(directory, "qwen3_moe", **({"num_hidden_layers": 2} | experts | config))


def make_batch(size: int = 8, width: int = 14, seed: int = 0) -> BatchedDataDict:
    """Return samples with prompts and completions of different lengths; the loss excludes one of them."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, width + 1, (size,), generator=draws)
    prompts = torch.randint(2, 5, (size,), generator=draws)
    position = torch.arange(width)
    inside = position < lengths[:, None]
    sample_mask = torch.ones(size)
    sample_mask[1] = 0.0
    return BatchedDataDict(
        input_ids=torch.randint(1, VOCABULARY, (size, width), generator=draws) * inside,
        input_lengths=lengths,
        token_mask=(inside & (position >= prompts[:, None])).float(),
        sample_mask=sample_mask,
        advantages=torch.randn(size, generator=draws),
    )


def with_experts(batch: BatchedDataDict, seed: int = 0) -> BatchedDataDict:
    """Add random experts for the two layers of `make_moe`, other than those that its routers choose."""
    draws = torch.Generator().manual_seed(seed)
    scores = torch.rand(*batch["input_ids"].shape, 2, 8, generator=draws)
    batch["routed_experts"] = scores.topk(2).indices.flatten(2).to(torch.int16)
    return batch


def pairs_batch(seed: int = 0, width: int = 14) -> BatchedDataDict:
    """Return pairs of answers of different lengths to random prompts; the second pair is excluded."""
    draws = torch.Generator().manual_seed(seed)
    rows = 2 * PAIRS
    prompts = torch.randint(2, 5, (PAIRS,), generator=draws).repeat_interleave(2)
    lengths = torch.randint(6, width + 1, (rows,), generator=draws)
    position = torch.arange(width)
    inside = position < lengths[:, None]
    sample_mask = torch.ones(rows)
    sample_mask[2:4] = 0.0
    return BatchedDataDict(
        input_ids=torch.randint(1, VOCABULARY, (rows, width), generator=draws) * inside,
        input_lengths=lengths,
        token_mask=(inside & (position >= prompts[:, None])).float(),
        sample_mask=sample_mask,
        reference_logprobs=-30 * torch.rand(rows, generator=draws, dtype=torch.float64),
        margin=torch.zeros(rows),
    )


def shard_of(
    batch: BatchedDataDict, rank: int, num_ranks: int, rows_per_group: int = 1, **config: Any
) -> BatchedDataDict:
    """Return a data-parallel rank's rows, with a plan of micro-batches if the mode of `config` needs one."""
    batching = BatchingConfig(**config.get("batching", {}))
    result = batch.shard_by_batch_size(num_ranks, None, rows_per_group=rows_per_group, **sharding_args(batching))
    return (result[0] if isinstance(result, tuple) else result)[rank]


def advantage_loss(
    logprobs: torch.Tensor, batch: Any, global_num_tokens: torch.Tensor, global_num_samples: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy gradient over tokens with a sample-level term, and metrics of every reduction."""
    mask = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
    values = logprobs[:, 1:] * mask
    loss = -(values * batch["advantages"][:, None]).sum() / global_num_tokens
    per_sample = values.sum(1) / mask.sum(1).clamp(min=1)
    loss = loss - 0.1 * per_sample.sum() / global_num_samples
    worst = (logprobs[:, 1:] * mask).min().detach()
    best = batch["advantages"].max()
    return loss, {
        "mean_logprob": values.detach().sum() / global_num_tokens,
        "logprob_min": worst,
        "advantage_max": best,
    }


def nan_loss(*args: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, metrics = advantage_loss(*args)
    return loss * float("nan"), metrics


def make_worker(model: Path | str, device_type: str = "cpu", **config: Any) -> TorchPolicyWorker:
    defaults: dict[str, Any] = {
        "num_threads": 1,
        "max_sequence_length": 64,
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "eps": EPS},
        "scheduler": {"kind": "cosine", "warmup_steps": 2},
        "max_grad_norm": 0.5,
    }
    policy = PolicyConfig(model_name=str(model), **(defaults | config))
    return TorchPolicyWorker(policy, total_steps=20, seed=3, device_type=device_type, weight_transport="local")


def weights(worker: TorchPolicyWorker) -> dict[str, torch.Tensor]:
    """Return full copies of the parameters and of the optimizer's state. A collective."""
    model, optimizer = worker._model, worker._optimizer
    state = {name: tensor.cpu().clone() for name, tensor in model.full_tensors()}
    for name in optimizer.names:
        for key, tensor in optimizer.state(name).items():
            state[f"{name}/{key}"] = model.full(tensor).cpu().clone()
    return state


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Assert that all tensors are bit-identical."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different
