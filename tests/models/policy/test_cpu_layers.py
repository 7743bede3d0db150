"""Tests that fused attention and MLP blocks compute what transformers computes, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import make_model, make_moe
from transformers import AutoModelForCausalLM

from nemo_rl.models import onednn
from nemo_rl.models.policy import cpu_kernels
from nemo_rl.models.policy.config import LoraConfig
from nemo_rl.models.policy.cpu_kernels import use_cpu_kernels
from nemo_rl.models.policy.cpu_layers import _FusedAttention, _FusedLayer, _FusedMLP
from nemo_rl.models.policy.lora import add_adapters


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)


def fused(model: Any) -> tuple[int, int, int]:
    """Return the numbers of fused attention blocks, MLPs, and layers of both."""
    attention, mlps, layers = (
        sum(isinstance(module, kind) for module in model.modules())
        for kind in (_FusedAttention, _FusedMLP, _FusedLayer)
    )
    return attention, mlps, layers


@pytest.mark.parametrize("is_compiled", [False, True], ids=["Python", "TorchScript"])
@pytest.mark.parametrize("uses_onednn", [False, True], ids=["MKL", "oneDNN"])
@pytest.mark.parametrize(
    ("family", "config", "blocks"),
    [
        ("llama", {}, (4, 4, 4)),
        ("llama", {"attention_bias": True}, (4, 4, 4)),
        ("llama", {"mlp_bias": True}, (4, 0, 0)),
        ("llama", {"hidden_act": "gelu"}, (4, 0, 0)),
        ("qwen2", {}, (4, 4, 4)),
        ("qwen3", {}, (4, 4, 4)),
        ("gemma3_text", {}, (0, 0, 0)),
    ],
    ids=["llama", "attention bias", "mlp bias", "gelu", "qwen2", "qwen3", "gemma3"],
)
def test_fused_blocks_match_transformers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    config: dict[str, Any],
    blocks: tuple[int, int, int],
    uses_onednn: bool,
    is_compiled: bool,
) -> None:
    if uses_onednn and not onednn.is_usable(torch.float32):
        pytest.skip("this CPU has no oneDNN products in float32")
    monkeypatch.setattr(cpu_kernels, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(cpu_kernels, "_is_faster", lambda: uses_onednn)
    monkeypatch.setattr(cpu_kernels, "_make_functions", cpu_kernels._make_functions.__wrapped__)  # not cached
    if not is_compiled:
        monkeypatch.delattr(torch.jit, "script")
    directory = make_model(tmp_path, family, **config)
    torch.manual_seed(0)
    ids = torch.randint(1, 29, (3, 9))
    results = []
    for changed in (False, True):
        model = load(directory)
        names = [name for name, _ in model.named_parameters()]
        classes = [type(module).__name__ for module in model.modules()]
        if changed:
            use_cpu_kernels(model)
            assert fused(model) == blocks
            assert [name for name, _ in model.named_parameters()] == names
            ends = ("Attention", "MLP", "Layer")
            blocks_only = [name for name in classes if name.endswith(ends)]
            assert [n for m in model.modules() if (n := type(m).__name__).endswith(ends)] == blocks_only
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_experts_are_fused_too(tmp_path: Path) -> None:
    directory = make_moe(tmp_path, mlp_only_layers=[0])
    model = load(directory)
    use_cpu_kernels(model)
    assert fused(model) == (2, 1, 0)
    ids = torch.randint(1, 29, (3, 9))
    torch.testing.assert_close(
        model(input_ids=ids, use_cache=False).logits, load(directory)(input_ids=ids, use_cache=False).logits
    )


def test_frozen_weights_get_no_gradient(tmp_path: Path) -> None:
    model = load(make_model(tmp_path, "llama"))
    use_cpu_kernels(model)
    frozen = ("q_proj", "v_proj", "up_proj", "down_proj")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    model(input_ids=torch.randint(1, 29, (2, 5)), use_cache=False).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == any(part in name for part in frozen), name


def test_generation_with_a_cache_uses_the_original_block(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "llama")
    model, plain = load(directory), load(directory)
    use_cpu_kernels(model)
    ids = torch.randint(1, 29, (2, 5))
    with torch.no_grad():
        cached, expected = model(input_ids=ids, use_cache=True), plain(input_ids=ids, use_cache=True)
    torch.testing.assert_close(cached.logits, expected.logits)
    assert cached.past_key_values.get_seq_length() == 5


def test_adapters_keep_their_projections(tmp_path: Path) -> None:
    model = load(make_model(tmp_path, "llama"))
    add_adapters(model, LoraConfig(rank=2, target_modules=["q_proj", "up_proj"]))
    use_cpu_kernels(model)
    assert fused(model) == (0, 0, 0)
