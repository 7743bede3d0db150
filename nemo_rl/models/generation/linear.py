"""Matrix products of the decoder.

On the CPU they go to oneDNN, weights as they are: on processors that are not Intel's, torch's default (MKL) reaches
less than half of oneDNN's speed (97 against 200 GFLOP/s on one core of an EPYC, 256 x 96 x 512 in float32).
The operators are those that torch's own compiler emits; where a build of torch lacks them, `F.linear` does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [N, in] times weight [out, in] transposed, plus bias."""
    if _ONEDNN and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """`linear(x, weight, bias) + residual` in one operation."""
    if _ONEDNN and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    if bias is None:
        return torch.addmm(residual, x, weight.t())
    return F.linear(x, weight, bias).add_(residual)
