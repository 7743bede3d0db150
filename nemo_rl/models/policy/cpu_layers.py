"""Layers of Llama-like models for training in float32 on a CPU.

With a small model, a step consists of thousands of short operations, so their number matters, and so does the time
that threads wait for one another's interpreter between them. Here q, k, v are one matrix product, and so are gate, up;
norms, residual connections, rotary embeddings and the gated MLP are parts of a few functions with explicit gradients::

    x ─► norm, q k v ─► rotate ─► attention ─► output, + x ─► norm, gate up, silu, down, + ─► next layer
         _JointProduct  _Rotate   attend       _AddedProduct  _GatedMLP

Layers keep their parameters, and compute what transformers computes, up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_rl.models.policy.cpu_functions import LayerFunctions

# Blocks with the parameters of Llama's; q_norm and k_norm are used if they exist.
_LAYERS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_ATTENTION = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention")
_MLP = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP")
_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm")


def use_fused_layers(
    model: PreTrainedModel, attend: Callable[..., tuple[torch.Tensor, None]], functions: LayerFunctions
) -> None:
    """Replace the layers of a model, or their blocks, in place. Parameters and names do not change.

    Args:
        model: blocks with adapters, or with other activations than SiLU, stay as they are.
        attend: computes attention as transformers calls it.
        functions: compute all else.
    """
    module: Any
    for module in model.modules():
        name = type(module).__name__
        if name in _ATTENTION and _are_plain(module.q_proj, module.k_proj, module.v_proj):
            module.__class__ = _subclass(type(module), _FusedAttention)
            module._attend, module._functions = attend, functions
        elif name in _MLP and _is_usual_mlp(module):
            module.__class__ = _subclass(type(module), _FusedMLP)
            module._functions = functions
    for module in model.modules():
        if type(module).__name__ in _LAYERS and _has_fused_blocks(module):
            module.__class__ = _subclass(type(module), _FusedLayer)


def use_fused_norms(model: nn.Module, functions: LayerFunctions) -> None:
    """Replace the RMS norms of a model in place."""
    module: Any
    for module in model.modules():
        if type(module).__name__ in _NORMS:
            module.__class__ = CpuRMSNorm
            module._functions = functions


def _has_fused_blocks(layer: Any) -> bool:
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (
        isinstance(layer.self_attn, _FusedAttention)
        and _are_plain(cast(Any, layer.self_attn).o_proj)
        and isinstance(layer.mlp, _FusedMLP)
        and all(type(norm).__name__ in _NORMS for norm in norms)
    )


def _is_usual_mlp(module: Any) -> bool:
    is_silu = type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
    return is_silu and module.gate_proj.bias is None and _are_plain(module.gate_proj, module.up_proj, module.down_proj)


def _are_plain(*layers: nn.Module) -> bool:
    return all(isinstance(layer, nn.Linear) and not hasattr(layer, "lora_A") for layer in layers)


def _subclass(base: type[nn.Module], mixin: type) -> type[nn.Module]:
    # The name stays: it is in messages, and in what transformers and FSDP look for.
    return cast(type[nn.Module], type(base.__name__, (mixin, base), {}))


class _FusedLayer(nn.Module):
    """Computes a layer of a fused attention and a fused MLP block, with norms and residual connections."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Map [B, T, hidden] to [B, T, hidden]."""
        layer = cast(Any, self)
        if past_key_values is not None or position_embeddings is None or torch.is_autocast_enabled("cpu"):
            result: torch.Tensor = super().forward(  # type: ignore[misc]
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **options,
            )
            return result
        attention: _FusedAttention = layer.self_attn
        options["position_ids"] = position_ids
        attended = attention.attend(
            hidden_states, layer.input_layernorm, position_embeddings, attention_mask, **options
        )
        output, flat = cast(Any, attention).o_proj, hidden_states.reshape(-1, hidden_states.shape[-1])
        flat = _AddedProduct.apply(attended.flatten(0, 1), output.weight, flat, attention._functions)
        if output.bias is not None:
            flat = flat + output.bias
        computed: torch.Tensor = layer.mlp.compute(flat, layer.post_attention_layernorm)
        return computed.view(hidden_states.shape)


class _FusedAttention(nn.Module):
    """Computes q, k, v in one product."""

    _attend: Callable[..., tuple[torch.Tensor, None]]
    _functions: LayerFunctions

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Map [B, T, hidden] to [B, T, hidden] and None."""
        if past_key_values is not None or position_embeddings is None or torch.is_autocast_enabled("cpu"):
            return super().forward(  # type: ignore[misc]
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **options,
            )
        attended = self.attend(hidden_states, None, position_embeddings, attention_mask, **options)
        return cast(Any, self).o_proj(attended), None

    def attend(
        self,
        hidden_states: torch.Tensor,
        norm: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        """Map [B, T, hidden] to what the output projection reads, [B, T, heads * head_dim].

        Args:
            hidden_states: input of the projections, or of `norm`.
            norm: an RMS norm before the projections, or None.
            position_embeddings: see transformers, as for the other arguments.
        """
        block, functions = cast(Any, self), self._functions
        layers = [block.q_proj, block.k_proj, block.v_proj]
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        joint = _JointProduct.apply(flat, *_norm_arguments(norm), functions, *(layer.weight for layer in layers))
        if layers[0].bias is not None:
            joint = joint + torch.cat([layer.bias for layer in layers])
        heads = joint.view(*hidden_states.shape[:-1], -1, block.head_dim)
        num_queries, num_keys = (layer.out_features // block.head_dim for layer in layers[:2])
        cos, sin = position_embeddings
        half = block.head_dim // 2
        # rotate_half(x) * sin equals x with its halves swapped, times sin with its first half negated.
        cos, sin = cos.unsqueeze(-2), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(-2)
        if hasattr(block, "q_norm"):
            query, key, value = heads.split([num_queries, num_keys, num_keys], dim=-2)
            query, key = (_Rotate.apply(x, cos, sin, functions) for x in (block.q_norm(query), block.k_norm(key)))
        else:
            rotated, value = heads.split([num_queries + num_keys, num_keys], dim=-2)
            query, key = _Rotate.apply(rotated, cos, sin, functions).split([num_queries, num_keys], dim=-2)
        if hasattr(block, "sliding_window"):
            options["sliding_window"] = block.sliding_window
        attended, _ = block._attend(
            self, *(x.transpose(1, 2) for x in (query, key, value)), attention_mask, scaling=block.scaling, **options
        )
        return attended.flatten(2)


class _FusedMLP(nn.Module):
    """Computes down(silu(gate(x)) * up(x))."""

    _functions: LayerFunctions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., hidden] to [..., hidden]."""
        if torch.is_autocast_enabled("cpu"):
            return cast(torch.Tensor, super().forward(x))  # type: ignore[misc]
        return self.compute(x.reshape(-1, x.shape[-1]), None).view(x.shape)

    def compute(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        """Map [N, hidden] to [N, hidden]; with an RMS norm, to x + the MLP of the normalized x."""
        block = cast(Any, self)
        weights = (block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight)
        result: torch.Tensor = _GatedMLP.apply(x, *_norm_arguments(norm), self._functions, *weights)
        return result


class CpuRMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""

    weight: nn.Parameter
    variance_epsilon: float
    _functions: LayerFunctions

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize [..., n] over the last dimension."""
        result: torch.Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self._functions)
        return result


def _norm_arguments(norm: Any) -> tuple[torch.Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, functions: LayerFunctions) -> torch.Tensor:
        normal, inverse = functions.norm(x, eps)
        ctx.save_for_backward(normal, inverse, weight)
        ctx.functions = functions
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.functions.norm_gradients(*gradients, *ctx.saved_tensors), None, None


class _JointProduct(torch.autograd.Function):
    """Multiply x [N, in], or its RMS norm, by the transposes of several w [out_i, in]: [N, sum of out_i]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: torch.Tensor | None,
        eps: float,
        functions: LayerFunctions,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        result: torch.Tensor
        result, *saved = functions.joint(x, norm, eps, list(weights))
        ctx.save_for_backward(*saved, norm, *weights)
        ctx.functions = functions
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, norm, *weights = ctx.saved_tensors
        needs_x, needs_norm, _, _, *needs_weights = ctx.needs_input_grad
        of_x, of_norm, of_weights = ctx.functions.joint_gradients(
            *gradients, x, inverse, norm, weights, needs_x or needs_norm, any(needs_weights)
        )
        return of_x, of_norm, None, None, *_parts(of_weights, weights, needs_weights)


def _parts(gradient: torch.Tensor | None, weights: list[torch.Tensor], needed: list[bool]) -> list[torch.Tensor | None]:
    """Divide the gradient of stacked weights."""
    if gradient is None:
        return [None for _ in weights]
    parts = gradient.split([len(weight) for weight in weights])
    return [part if is_needed else None for part, is_needed in zip(parts, needed, strict=True)]


class _AddedProduct(torch.autograd.Function):
    """Multiply x [N, in] by the transpose of w [out, in], and add a residual [N, out]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor, functions: LayerFunctions
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.functions = functions
        result: torch.Tensor = functions.product_add(x, w, residual)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x, of_w = ctx.functions.product_gradients(*gradients, *ctx.saved_tensors, *ctx.needs_input_grad[:2])
        return of_x, of_w, gradients[0], None


class _GatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) of x [N, hidden]; with the weight of an RMS norm, x + that of the normalized x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: torch.Tensor | None,
        eps: float,
        functions: LayerFunctions,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        result: torch.Tensor
        result, normal, inverse, both, active = functions.mlp(x, norm, eps, *weights)
        ctx.save_for_backward(normal, inverse, norm, both, active, *weights)
        ctx.functions = functions
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        gate, up, _ = saved[-3:]
        needs_x, needs_norm, _, _, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        of_x, of_norm, of_both, of_down = ctx.functions.mlp_gradients(
            *gradients, *saved, needs_x or needs_norm, needs_gate or needs_up, needs_down
        )
        return of_x, of_norm, None, None, *_parts(of_both, [gate, up], [needs_gate, needs_up]), of_down


class _Rotate(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021): x cos + swap(x) sin, where `swap` exchanges the halves of a head."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, functions: LayerFunctions
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.functions = functions
        result: torch.Tensor = functions.rotate(x, cos, sin)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.functions.rotate_gradients(*gradients, *ctx.saved_tensors), None, None, None
