from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import make_llama, make_model
from torch import nn
from transformers import AutoModelForCausalLM

from nemo_rl.models.policy import cpu_kernels
from nemo_rl.models.policy.cpu_kernels import OneDnnLinear, use_cpu_kernels, use_onednn_linears
from nemo_rl.models.policy.cpu_layers import CpuRMSNorm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(300, 48), (10, 30, 48)])
def test_onednn_linear_matches_plain_linear(
    monkeypatch: pytest.MonkeyPatch, bias: bool, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(cpu_kernels, "MIN_PRODUCTS", 0)
    torch.manual_seed(0)
    plain, fast = nn.Linear(48, 64, bias=bias), OneDnnLinear(48, 64, bias=bias)
    fast.load_state_dict(plain.state_dict())
    inputs, gradient = torch.randn(shape), torch.randn(*shape[:-1], 64)
    results = []
    for layer in (plain, fast):
        x = inputs.clone().requires_grad_()
        y = layer(x)
        y.backward(gradient)
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_frozen_weights_and_inputs_need_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "MIN_PRODUCTS", 0)
    layer = OneDnnLinear(4, 4).requires_grad_(False)
    assert not layer(torch.randn(3, 4)).requires_grad
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 4))


def test_small_products_and_other_dtypes_use_plain_linear() -> None:
    layer = OneDnnLinear(4, 4)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2000, 4)).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64


def test_only_plain_layers_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class CustomLinear(nn.Linear):
        pass

    monkeypatch.setattr(cpu_kernels, "_is_faster", lambda: True)
    model = nn.Sequential(nn.Linear(2, 2), CustomLinear(2, 2))
    before = list(model.state_dict())
    assert use_onednn_linears(model)
    assert [type(layer) for layer in model] == [OneDnnLinear, CustomLinear]
    assert list(model.state_dict()) == before
    monkeypatch.setattr(cpu_kernels, "_is_faster", lambda: False)
    assert not use_onednn_linears(nn.Sequential(nn.Linear(2, 2)))


@pytest.fixture(params=["causal", "padded on the left", "longer than short"])
def case(request, tmp_path, monkeypatch):
    """A model, and token ids with a mask (None: all tokens count)."""
    make_llama(tmp_path)
    if request.param == "longer than short":
        monkeypatch.setattr(cpu_kernels, "MAX_SHORT_LENGTH", 4)
    torch.manual_seed(0)
    mask = None
    if request.param == "padded on the left":
        mask = torch.ones(3, 9, dtype=torch.int64)
        mask[1, :4] = 0
    return tmp_path, torch.randint(1, 16, (3, 9)), mask


def test_cpu_kernels_match_transformers(case) -> None:
    directory, ids, mask = case
    results = []
    for changed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
        names = [name for name, _ in model.named_parameters()]
        if changed:
            use_cpu_kernels(model)
            assert [name for name, _ in model.named_parameters()] == names
            assert any(isinstance(module, CpuRMSNorm) for module in model.modules())
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if mask is not None:
            logits = logits * mask[..., None]
        logits.square().mean().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("lengths", "is_padded"),
    [([5, 1, 6, 3], True), ([9], False), ([1, 1, 1], True), ([30, *[1] * 10], False)],
    ids=["several", "one", "single tokens", "one long, many short"],
)
def test_packed_sequences_match_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, lengths: list[int], is_padded: bool
) -> None:
    """Gemma's windows have 4 tokens: only the layers without a window, or with short sequences, are padded."""
    directory = make_model(tmp_path, family)
    torch.manual_seed(0)
    ids = torch.randint(1, 16, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batches: list[int] = []
    attend = cpu_kernels.cpu_attention

    def counted(module: nn.Module, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        batches.append(len(query))
        return attend(module, query, *arguments, **options)

    monkeypatch.setattr(cpu_kernels, "cpu_attention", counted)
    results = []
    for changed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
        if changed:
            use_cpu_kernels(model)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        logits.square().mean().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    assert (len(lengths) in batches and len(lengths) > 1) == is_padded
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_eager_attention_is_kept(tmp_path) -> None:
    make_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    use_cpu_kernels(model)
    assert model.config._attn_implementation == "eager"
