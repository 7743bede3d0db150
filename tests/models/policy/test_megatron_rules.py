"""Conversion between Hugging Face tensors and Megatron's shards, without megatron-core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import CONFIGS, make_model
from transformers import AutoModelForCausalLM

from nemo_rl.errors import ModelError
from nemo_rl.models.policy.logprob_forward import token_logprobs
from nemo_rl.models.policy.megatron.families import find_family
from nemo_rl.models.policy.megatron.logprobs import vocabulary_parallel_logprobs
from nemo_rl.models.policy.megatron.sharding_rules import ModelShape, SplitAttention, SplitGated


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_rules_round_trip_every_parameter(tmp_path: Path, name: str, size: int) -> None:
    module = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, name, tie_word_embeddings=False))
    family, shape = (
        find_family(module.config.model_type),
        ModelShape(2, tensor_parallel_size=size, expert_parallel_size=size),
    )
    remaining = {key: parameter.detach() for key, parameter in module.named_parameters()}
    tables = [("", family.model), *((f"model.layers.{layer}.", family.layer) for layer in range(4))]
    for prefix, table in tables:
        for rule in table.values():
            tensors = [remaining.pop(f"{prefix}{part}") for part in rule.names]
            shards = rule.shards(tensors, shape)
            assert len(shards) == (size if rule.split else 1)
            for tensor, actual in zip(tensors, rule.tensors(shards, [t.shape for t in tensors], shape), strict=True):
                assert torch.equal(tensor, actual)
    assert not remaining, f"the tables lack {sorted(remaining)}"


def test_attention_layout_by_group() -> None:
    query, key, value = torch.arange(4.0), torch.tensor([10.0, 11.0]), torch.tensor([20.0, 21.0])
    rule = SplitAttention("q", "k", "v")
    shards = rule.shards([query, key, value], ModelShape(2, 2))
    assert shards.tolist() == [[0, 1, 10, 20], [2, 3, 11, 21]]


def test_gated_mlp_layout() -> None:
    rule = SplitGated("gate", "up")
    shards = rule.shards([torch.arange(4.0), torch.arange(10.0, 14.0)], ModelShape(1, 2))
    assert shards.tolist() == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_unsupported_family_lists_supported_ones() -> None:
    with pytest.raises(ModelError, match=r"'mamba'; supported: gemma3_text, llama, qwen2, qwen3"):
        find_family("mamba")


def logprobs_of_shard(rank: int, vocabulary: int, padded: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    torch.distributed.init_process_group("gloo", init_method="env://")
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(7, padded, generator=draws) * 5
    tokens = torch.randint(vocabulary, (7,), generator=draws)
    local = logits.chunk(2, dim=1)[rank].clone().requires_grad_()
    group = torch.distributed.group.WORLD
    assert group is not None
    logprobs = vocabulary_parallel_logprobs(local, tokens, vocabulary, group, temperature)
    (logprobs * torch.arange(7)).sum().backward()
    assert local.grad is not None
    return logprobs.detach(), local.grad


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.5])
@pytest.mark.parametrize(("vocabulary", "padded"), [(10, 10), (9, 10), (3, 10)])
def test_vocabulary_parallel_logprobs_match_full_logits(
    two_ranks: RankProcesses, vocabulary: int, padded: int, temperature: float
) -> None:
    ranks = two_ranks.run(logprobs_of_shard, vocabulary, padded, temperature)
    (first, first_gradient), (second, second_gradient) = ranks
    draws = torch.Generator().manual_seed(1)
    logits = (torch.randn(7, padded, generator=draws) * 5).requires_grad_()
    tokens = torch.randint(vocabulary, (7,), generator=draws)
    expected = token_logprobs(logits[:, :vocabulary], tokens, temperature)
    (expected * torch.arange(7)).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(first, expected.detach())
    assert torch.equal(first, second)
    torch.testing.assert_close(torch.cat([first_gradient, second_gradient], dim=1), logits.grad)
