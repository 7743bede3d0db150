"""oneDNN's matrix products, and whether this CPU has them.

The operators are the ones that torch's compiler emits. They are not part of torch's public interface, and they raise
where oneDNN has no kernel for a dtype: in bfloat16 on x86-64 CPUs without AVX-512, for example. `F.linear` works
everywhere: for bfloat16 it then takes kernels of torch's own. So call `is_usable` where a model is made, and these
operators only after it has returned True.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F

from nemo_rl.models.torchscript import TorchScriptError

logger = logging.getLogger(__name__)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [N, in] times weight [out, in] transposed, plus bias [out], on the CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """`linear(x, weight, bias) + residual` in one operation; residual [N, out]."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


# The operators as TorchScript's graphs: its front end for Python has no type for an empty list of optional scalars.
_SCRIPTED_LINEAR = """
graph(%x : Tensor, %weight : Tensor, %bias : Tensor?):
  %attr : str = prim::Constant[value="none"]()
  %algorithm : str = prim::Constant[value=""]()
  %scalars : Scalar?[] = prim::ListConstruct()
  %y : Tensor = mkldnn::_linear_pointwise(%x, %weight, %bias, %attr, %scalars, %algorithm)
  return (%y)
"""
_SCRIPTED_LINEAR_ADD = """
graph(%x : Tensor, %weight : Tensor, %bias : Tensor?, %residual : Tensor):
  %attr : str = prim::Constant[value="add"]()
  %y : Tensor = mkldnn::_linear_pointwise(%x, %residual, %weight, %bias, %attr)
  return (%y)
"""


def scripted_linears() -> tuple[Any, Any]:
    """Return `linear` and `linear_add` as functions of TorchScript.

    Raises:
        TorchScriptError: this version of torch cannot make them.
    """
    try:
        linear, linear_add = (
            torch._C._create_function_from_graph(name, torch._C.parse_ir(graph))
            for name, graph in (("onednn_linear", _SCRIPTED_LINEAR), ("onednn_linear_add", _SCRIPTED_LINEAR_ADD))
        )
    except (AttributeError, RuntimeError) as error:
        raise TorchScriptError(str(error)) from error
    return linear, linear_add


@functools.cache
def is_usable(dtype: torch.dtype) -> bool:
    """Whether `linear` and `linear_add` work in `dtype` on this CPU. The first call for a dtype tries both."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.inference_mode():
            correct = all(_is_correct(num_rows, dtype) for num_rows in (1, 64))
    except (AttributeError, RuntimeError) as error:
        logger.debug("oneDNN's matrix products are not used in %s: %s", dtype, error)
        return False
    if not correct:
        logger.warning("oneDNN's matrix products are wrong in %s on this CPU; torch's own are used", dtype)
    return correct


@functools.cache
def warn_if_emulated(device_type: str, dtype: torch.dtype) -> None:
    """Log a warning, once in a process, if a model in `dtype` on this device has to do without oneDNN."""
    if device_type == "cpu" and dtype != torch.float32 and not is_usable(dtype):
        name = str(dtype).removeprefix("torch.")
        logger.warning("%s is emulated on this CPU, many times slower than float32: prefer precision=float32", name)


def _is_correct(num_rows: int, dtype: torch.dtype) -> bool:
    """Compare with `F.linear` on small integers, whose sums every floating-point dtype represents exactly."""

    def integers(*shape: int) -> torch.Tensor:
        values = torch.arange(torch.Size(shape).numel(), device="cpu")
        return ((values * 7 + 3) % 11 % 3 - 1).view(shape).to(dtype)

    x, weight, bias, residual = integers(num_rows, 96), integers(80, 96), integers(80), integers(num_rows, 80)
    expected = F.linear(x.float(), weight.float()).to(dtype)
    transposed = weight.t().contiguous().t()  # as in a backward pass
    return (
        torch.equal(linear(x, weight, None), expected)
        and torch.equal(linear(x, transposed, None), expected)
        and torch.equal(linear(x, weight, bias), expected + bias)
        and torch.equal(linear_add(x, weight, None, residual), expected + residual)
        and torch.equal(linear_add(x, weight, bias, residual), expected + bias + residual)
    )
