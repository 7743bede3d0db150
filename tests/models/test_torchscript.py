"""Tests functions that run as TorchScript, which reads annotations: no `from __future__ import annotations` here."""

import threading

import pytest
import torch

from nemo_rl.models import onednn
from nemo_rl.models.torchscript import TorchScriptError, compiled, compiled_or_plain


def double(x: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        x = x * 2
    return x


def unsupported(x: torch.Tensor) -> torch.Tensor:
    return x + len({*range(3)})


def test_a_compiled_function_computes_the_same_with_gradients() -> None:
    x = torch.randn(3, requires_grad=True)
    result = compiled(double)(x, 3)
    torch.testing.assert_close(result, 8 * x)
    result.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 8.0))


def test_a_function_that_cannot_be_compiled_is_named() -> None:
    with pytest.raises(TorchScriptError, match="unsupported"):
        compiled(unsupported)


def test_functions_run_in_python_where_torch_cannot_compile_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(compile_them: bool) -> tuple[object, ...]:
        return (compiled(double),) if compile_them else (double,)

    (function,), is_compiled = compiled_or_plain(make, "tests")
    assert is_compiled
    assert function is not double
    monkeypatch.delattr(torch.jit, "script")  # as in a version of torch without TorchScript
    assert compiled_or_plain(make, "tests") == ((double,), False)


@pytest.mark.parametrize("bias", [False, True])
def test_scripted_products_equal_those_of_python(bias: bool) -> None:
    if not onednn.is_usable(torch.float32):
        pytest.skip("this CPU has no oneDNN products in float32")
    linear, linear_add = onednn.scripted_linears()
    x, w, residual = torch.randn(5, 8), torch.randn(7, 8), torch.randn(5, 7)
    b = torch.randn(7) if bias else None
    assert torch.equal(linear(x, w, b), onednn.linear(x, w, b))
    assert torch.equal(linear_add(x, w, b, residual), onednn.linear_add(x, w, b, residual))


def wait(x: torch.Tensor, flags: torch.Tensor, mine: int, other: int) -> torch.Tensor:
    flags[mine] = 1
    while int(flags[other]) == 0:
        x = x + 1
    return x


def test_two_threads_run_compiled_functions_at_the_same_time() -> None:
    function, flags = compiled(wait), torch.zeros(2, dtype=torch.int64)
    # Each call ends only after the other has begun: with the interpreter's lock held, both would wait for ever.
    threads = [
        threading.Thread(target=function, args=(torch.zeros(1), flags, mine, 1 - mine), daemon=True) for mine in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
