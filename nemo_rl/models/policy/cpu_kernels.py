"""Linear layers, attention and norms of Hugging Face models for training in float32 on a CPU.

Linear layers: on AMD CPUs they use oneDNN. torch sends float32 matrix products to MKL, which uses only 256-bit kernels
on CPUs of other vendors than Intel. oneDNN, which torch ships and uses for bfloat16, has 512-bit kernels for all CPUs:
212 instead of 82 to 95 GFLOP/s on one core of an EPYC with AVX-512, for shapes of small models.

Attention and norms: with small models and short sequences, a layer spends most of its time outside matrix products.
torch's attention kernel for CPUs is optimized for long sequences, and transformers computes a norm as six operations,
each with its own gradient. Here, attention over a short sequence is two batched matrix products and a softmax, and a
norm is one operation with an explicit gradient. Packed sequences attend as a padded batch, because with a mask each
token would be multiplied by all tokens of the row.

All compute the same as torch and transformers, in float32, up to the order of additions.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nemo_rl.models import onednn
from nemo_rl.models.policy.cpu_functions import (
    PLAIN_PRODUCTS,
    LayerFunctions,
    large_products,
    layer_functions,
    pad,
    unpad,
)
from nemo_rl.models.policy.cpu_layers import use_fused_layers, use_fused_norms
from nemo_rl.models.policy.sequence_layouts import PaddedSequences, SharedPrefixes
from nemo_rl.models.torchscript import compiled_or_plain

logger = logging.getLogger(__name__)

# With fewer multiplications, oneDNN's kernel lookup costs more than its faster kernel saves.
MIN_PRODUCTS = 4_000_000
# For longer sequences, torch's kernel, which never materializes all scores, is faster.
MAX_SHORT_LENGTH = 128
ATTENTION = "nemo_rl_cpu"


def use_onednn_linears(model: nn.Module) -> bool:
    """Let the plain `nn.Linear` layers of a float32 model on the CPU use oneDNN if it is faster.

    Layers are changed in place; parameters and names do not change. Returns whether any layer was changed.
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
        """Map [..., in_features] to [..., out_features]."""
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
    """Multiply x [N, in] by the transpose of w [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return onednn.linear(x, w, None)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, w = ctx.saved_tensors
        (gradient,) = gradients
        gradient = gradient.contiguous()
        x_gradient = onednn.linear(gradient, w.t(), None) if ctx.needs_input_grad[0] else None
        w_gradient = onednn.linear(gradient.t(), x.t(), None) if ctx.needs_input_grad[1] else None
        return x_gradient, w_gradient


@functools.cache
def _is_faster() -> bool:
    """Whether oneDNN's product works on this CPU and is faster than MKL's. Cached: equal on every call."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    try:
        cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError as error:
        logger.debug("linear layers keep using MKL: %s", error)
        return False
    return "AuthenticAMD" in cpu_info and onednn.is_usable(torch.float32)


def use_cpu_kernels(model: PreTrainedModel) -> None:
    """Let a float32 model on the CPU use the kernels of this module, in place. Parameters and names do not change."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, cpu_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
        use_fused_layers(model, cpu_attention, _functions())
    use_fused_norms(model, _functions())


def cpu_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    shared_prefixes: SharedPrefixes | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention with grouped heads, with the signature that transformers expects.

    Args:
        query: [B, heads, T, head_dim].
        key, value: [B, kv_heads, T, head_dim].
        attention_mask: None for plain causal attention, else [B or 1, 1, T, T] bool.
        position_ids: [1, T] int64. In a packed row, each sequence begins at position 0.
        shared_prefixes: the layout of the row; then `attention_mask` is ignored.

    Returns:
        [B, T, heads, head_dim], and None instead of the attention weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if shared_prefixes is not None:
        return _functions().attend_shared(query, key, value, shared_prefixes, scale, MAX_SHORT_LENGTH), None
    batch, _, length, _ = query.shape
    is_usual = key.shape[2] == length and not torch.is_autocast_enabled("cpu")
    if is_usual and batch == 1 and attention_mask is not None and position_ids is not None:
        packed = _packed_row(position_ids[0], options.get("sliding_window"))
        if packed is not None:
            query, key, value = (pad(packed, part) for part in (query, key, value))
            attended, _ = cpu_attention(module, query, key, value, None, scaling, **options)
            return unpad(packed, attended), None
    if length > MAX_SHORT_LENGTH or not is_usual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return _functions().attend(query, key, value, attention_mask, scale, MAX_SHORT_LENGTH), None


def _functions() -> LayerFunctions:
    return _make_functions(_is_faster(), MIN_PRODUCTS)


@functools.cache
def _make_functions(uses_onednn: bool, least: int) -> LayerFunctions:
    """Return the functions of layers, compiled if torch can; oneDNN computes products of at least `least` elements."""

    def make(compile_them: bool) -> LayerFunctions:
        products = PLAIN_PRODUCTS
        if uses_onednn:
            linears = onednn.scripted_linears() if compile_them else (onednn.linear, onednn.linear_add)
            products = large_products(linears, least)
        return layer_functions(products, compile_them=compile_them)

    functions, _ = compiled_or_plain(make, "layers")
    return functions


def _packed_row(position: torch.Tensor, window: int | None) -> PaddedSequences | None:
    """Return the sequences of a packed row with these positions [T], of which the first is 0.

    None if a mask is cheaper, or is needed for a sliding window.
    """
    sequence = (position == 0).cumsum(0) - 1
    row = PaddedSequences(sequence, position, int(sequence[-1]) + 1, int(position.max()) + 1)
    is_cheaper = row.num_sequences * row.longest**2 < len(position) ** 2
    return row if is_cheaper and (window is None or row.longest <= window) else None
