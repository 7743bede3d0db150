"""oneDNN's products on this CPU, and on one with AVX2 only, which two variables make of any x86-64 CPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nemo_rl.models import onednn
from nemo_rl.models.generation.linear import linear_ops

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    caches = (onednn.is_usable, onednn.warn_if_emulated)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_operators_compute_what_the_public_ones_do(dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(0)
    ops = linear_ops(torch.device("cpu"), dtype)
    x, weight, residual = (torch.randn(shape).to(dtype) for shape in ((6, 48), (40, 48), (6, 40)))
    bias = torch.randn(40).to(dtype) if with_bias else None
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    tolerance = 1e-4 if dtype == torch.float32 else 0.25  # of sums up to 30, rounded to 8 bits once or twice
    torch.testing.assert_close(ops.linear(x, weight, bias).float(), expected, rtol=0, atol=tolerance)
    added = ops.linear_add(x, weight, bias, residual)
    assert added.dtype == dtype
    torch.testing.assert_close(added.float(), expected + residual.float(), rtol=0, atol=tolerance)


def test_an_unknown_dtype_and_another_device_take_the_public_operators() -> None:
    assert not onednn.is_usable(torch.float64)
    assert linear_ops(torch.device("cpu"), torch.float64).linear is F.linear
    assert linear_ops(torch.device("meta"), torch.float32).linear is F.linear


def test_an_operator_that_computes_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(onednn, "linear_add", lambda x, weight, bias, residual: F.linear(x, weight, bias) + residual)
    monkeypatch.setattr(onednn, "linear", F.linear)
    assert onednn.is_usable(torch.float32)
    onednn.is_usable.cache_clear()
    monkeypatch.setattr(onednn, "linear", lambda x, weight, bias: F.linear(x, weight, bias) + (len(x) > 1))
    assert not onednn.is_usable(torch.float32)
    assert "wrong in torch.float32" in caplog.text


def test_a_torch_without_the_operator_multiplies_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(onednn, "linear", missing)
    assert linear_ops(torch.device("cpu"), torch.float32).linear is F.linear


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are for x86-64")
def test_a_cpu_with_avx2_only_multiplies_bfloat16_with_the_public_operators() -> None:
    program = (
        "import torch\n"
        "import torch.nn.functional as F\n"
        "from nemo_rl.models import onednn\n"
        "from nemo_rl.models.generation.linear import linear_ops\n"
        "assert torch.backends.cpu.get_cpu_capability() == 'AVX2'\n"
        "assert onednn.is_usable(torch.float32)\n"
        "x = torch.ones(2, 4, dtype=torch.bfloat16)\n"
        "try:\n"
        "    onednn.linear(x, x, None)\n"
        "except RuntimeError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError('the variables do not make a CPU with AVX2 only of this one')\n"
        "assert linear_ops(x.device, x.dtype).linear is F.linear\n"
    )
    environment = {**os.environ, **AVX2, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_bfloat16_that_is_emulated_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onednn, "is_usable", lambda dtype: dtype != torch.bfloat16)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        onednn.warn_if_emulated(device, dtype)
    assert not caplog.messages
    for _ in range(2):
        onednn.warn_if_emulated("cpu", torch.bfloat16)
    [message] = caplog.messages
    assert message.startswith("bfloat16 is emulated on this CPU")
