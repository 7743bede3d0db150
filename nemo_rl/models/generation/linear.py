"""Matrix products of the decoder.

On the CPU they go to oneDNN where it has them, weights as they are: on processors that are not Intel's, torch's default
for float32 (MKL) reaches less than half of oneDNN's speed (97 against 200 GFLOP/s on one core of an EPYC,
256 x 96 x 512). Everywhere else they go to torch's public operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nemo_rl.models import onednn


@dataclass(frozen=True)
class LinearOps:
    """The operators of one device and dtype.

    Attributes:
        linear: x [N, in], weight [out, in], bias [out] or None: x times weight transposed, plus bias.
        linear_add: the same, and a residual [N, out] that is added.
    """

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    linear_add: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]


def linear_ops(device: torch.device, dtype: torch.dtype) -> LinearOps:
    """The fastest operators that work there. Call it once, where the model is made."""
    if device.type == "cpu" and onednn.is_usable(dtype):
        return LinearOps(onednn.linear, onednn.linear_add)
    return LinearOps(F.linear, _linear_add)


def scripted_linear_ops(device: torch.device, dtype: torch.dtype) -> LinearOps:
    """The same operators, for functions that `torch.jit.script` compiles.

    Raises:
        TorchScriptError: this version of torch has none.
    """
    if linear_ops(device, dtype).linear is onednn.linear:
        return LinearOps(*onednn.scripted_linears())
    return linear_ops(device, dtype)


def _linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    if bias is None:
        return torch.addmm(residual, x, weight.t())
    return F.linear(x, weight, bias).add_(residual)
