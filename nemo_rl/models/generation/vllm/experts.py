"""vLLM's experts on CPUs, computed with the parameters themselves.

vLLM's CPU build packs the weights of experts for its kernel when a model is made. A later load would write the plain
layout into the packed one, and no digest could be computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


def keep_plain_experts() -> None:
    """Let vLLM's CPU build compute with the plain weights of experts. Call this before a model is made."""
    CPUUnquantizedExperts.process_weights_after_loading = _check_layer
    CPUUnquantizedExperts.apply = _apply


def _check_layer(experts: Any, layer: torch.nn.Module) -> None:
    """Refuse, instead of packing its weights, a layer that `_apply` does not compute."""
    activation = experts.moe_config.activation
    if activation is not MoEActivation.SILU or hasattr(layer, "w13_bias"):
        raise NotImplementedError(
            f"on CPUs, experts must have the activation silu and no biases; these have {activation.value}"
        )


def _apply(
    experts: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    **_: Any,
) -> None:
    """Write the weighted sum of the chosen experts' outputs to `output`.

    Args:
        output, hidden_states: [tokens, hidden].
        w1: [experts, 2 * width, hidden], the gates above the up projections.
        w2: [experts, hidden, width].
        topk_weights, topk_ids: [tokens, chosen experts].
    """
    output.zero_()
    for expert in topk_ids.unique().tolist():
        tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(hidden_states[tokens], w1[expert]).chunk(2, dim=-1)
        value = F.linear(F.silu(gate) * up, w2[expert]) * topk_weights[tokens, places, None]
        output.index_add_(0, tokens, value.to(output.dtype))
