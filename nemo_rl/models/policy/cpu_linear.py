"""Linear layers that use oneDNN for float32 on AMD CPUs.

torch sends float32 matrix products to MKL, which keeps to 256-bit kernels on CPUs that are not Intel's. oneDNN, which
torch ships and uses for bfloat16, has 512-bit ones for all: 212 instead of 82 to 95 GFLOP/s on one core of an EPYC with
AVX-512, for shapes of small models. Both compute in float32; only the order of additions differs.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_rl.models import onednn

logger = logging.getLogger(__name__)

# Below this many multiplications, oneDNN's look-up of the kernel costs more than the faster kernel saves.
MIN_PRODUCTS = 4_000_000


def use_onednn_linears(model: nn.Module) -> bool:
    """Let the plain `nn.Linear` layers of a float32 model on the CPU use oneDNN, where that is faster.

    Layers are changed in place; their parameters and names stay. Returns whether anything was changed.
    """
    if not _is_faster():
        return False
    layers = [module for module in model.modules() if type(module) is nn.Linear and module.weight.device.type == "cpu"]
    for layer in layers:
        layer.__class__ = OneDnnLinear
    return bool(layers)


class OneDnnLinear(nn.Linear):
    """`nn.Linear` that multiplies float32 matrices on the CPU with oneDNN, forward and backward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]"""
        fits = (
            input.dtype == self.weight.dtype == torch.float32
            and input.device.type == "cpu"
            and input.numel() * self.out_features >= MIN_PRODUCTS
            and not torch.is_autocast_enabled("cpu")
        )
        if not fits:
            return super().forward(input)
        flat = input.reshape(-1, self.in_features)
        output: torch.Tensor = _Product.apply(flat, self.weight)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*input.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """x [N, in], w [out, in] -> x wᵀ [N, out]"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return onednn.linear(x, w, None)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, w = ctx.saved_tensors
        (gradient,) = gradients
        gradient = gradient.contiguous()
        of_x = onednn.linear(gradient, w.t(), None) if ctx.needs_input_grad[0] else None
        of_w = onednn.linear(gradient.t(), x.t(), None) if ctx.needs_input_grad[1] else None
        return of_x, of_w


@functools.cache
def _is_faster() -> bool:
    """Whether this CPU is one that MKL serves badly, and oneDNN's product works on it. Equal on every call."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    try:
        cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError as error:
        logger.debug("linear layers stay with MKL: %s", error)
        return False
    return "AuthenticAMD" in cpu_info and onednn.is_usable(torch.float32)
