from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo_rl.models.policy import cpu_linear
from nemo_rl.models.policy.cpu_linear import OneDnnLinear, use_onednn_linears


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(300, 48), (10, 30, 48)])
def test_values_and_gradients_are_those_of_a_plain_layer(
    monkeypatch: pytest.MonkeyPatch, bias: bool, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(cpu_linear, "MIN_PRODUCTS", 0)
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
    monkeypatch.setattr(cpu_linear, "MIN_PRODUCTS", 0)
    layer = OneDnnLinear(4, 4).requires_grad_(False)
    assert not layer(torch.randn(3, 4)).requires_grad
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 4))


def test_small_products_and_other_dtypes_take_the_plain_way() -> None:
    layer = OneDnnLinear(4, 4)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2000, 4)).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64


def test_only_plain_layers_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnLinear(nn.Linear):
        pass

    monkeypatch.setattr(cpu_linear, "_is_faster", lambda: True)
    model = nn.Sequential(nn.Linear(2, 2), OwnLinear(2, 2))
    before = list(model.state_dict())
    assert use_onednn_linears(model)
    assert [type(layer) for layer in model] == [OneDnnLinear, OwnLinear]
    assert list(model.state_dict()) == before
    monkeypatch.setattr(cpu_linear, "_is_faster", lambda: False)
    assert not use_onednn_linears(nn.Sequential(nn.Linear(2, 2)))
