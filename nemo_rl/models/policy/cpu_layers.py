"""Attention and MLP blocks of Llama-like models for training in float32 on a CPU.

With a small model, a step consists of thousands of short operations, so their number matters. Here q, k, v are one
matrix product, and so are gate, up; rotary embeddings and the gated MLP are single operations with explicit gradients.
Blocks keep their parameters, and compute what transformers computes, up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

# Attention and MLP blocks with the parameters of Llama's; q_norm and k_norm are used if they exist.
_ATTENTION = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention")
_MLP = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP")
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def use_fused_layers(
    model: PreTrainedModel, attend: Callable[..., tuple[torch.Tensor, None]], product: Product
) -> None:
    """Replace the attention and MLP blocks of a model in place. Parameters and names do not change.

    Args:
        model: blocks with adapters, or with other activations than SiLU, stay as they are.
        attend: computes attention as transformers calls it.
        product: x [N, in] times the transpose of w [out, in], without gradient.
    """
    module: Any
    for module in model.modules():
        name = type(module).__name__
        if name in _ATTENTION and _are_plain(module.q_proj, module.k_proj, module.v_proj):
            module.__class__ = _subclass(type(module), _FusedAttention)
            module._attend, module._product = attend, product
        elif name in _MLP and _is_usual_mlp(module):
            module.__class__ = _subclass(type(module), _FusedMLP)
            module._product = product


def _is_usual_mlp(module: Any) -> bool:
    is_silu = type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
    return is_silu and module.gate_proj.bias is None and _are_plain(module.gate_proj, module.up_proj, module.down_proj)


def _are_plain(*layers: nn.Module) -> bool:
    return all(isinstance(layer, nn.Linear) and not hasattr(layer, "lora_A") for layer in layers)


def _subclass(base: type[nn.Module], mixin: type) -> type[nn.Module]:
    # The name stays: it is in messages, and in what transformers and FSDP look for.
    return cast(type[nn.Module], type(base.__name__, (mixin, base), {}))


class _FusedAttention(nn.Module):
    """Computes q, k, v in one product; what follows the projections is that of `attend`."""

    _attend: Callable[..., tuple[torch.Tensor, None]]
    _product: Product

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Map [B, T, hidden] to [B, T, hidden] and None."""
        block = cast(Any, self)
        if past_key_values is not None or position_embeddings is None or torch.is_autocast_enabled("cpu"):
            return super().forward(  # type: ignore[misc]
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **options,
            )
        layers = [block.q_proj, block.k_proj, block.v_proj]
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        joint = _JointProduct.apply(flat, block._product, *(layer.weight for layer in layers))
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
            query, key = (_Rotate.apply(x, cos, sin) for x in (block.q_norm(query), block.k_norm(key)))
        else:
            rotated, value = heads.split([num_queries + num_keys, num_keys], dim=-2)
            query, key = _Rotate.apply(rotated, cos, sin).split([num_queries, num_keys], dim=-2)
        if hasattr(block, "sliding_window"):
            options["sliding_window"] = block.sliding_window
        attended, _ = block._attend(
            self, *(x.transpose(1, 2) for x in (query, key, value)), attention_mask, scaling=block.scaling, **options
        )
        return block.o_proj(attended.flatten(2)), None


class _FusedMLP(nn.Module):
    """Computes down(silu(gate(x)) * up(x))."""

    _product: Product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., hidden] to [..., hidden]."""
        block = cast(Any, self)
        if torch.is_autocast_enabled("cpu"):
            return cast(torch.Tensor, super().forward(x))  # type: ignore[misc]
        weights = (block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight)
        result: torch.Tensor = _GatedMLP.apply(x.reshape(-1, x.shape[-1]), block._product, *weights)
        return result.view(x.shape)


class _JointProduct(torch.autograd.Function):
    """Multiply x [N, in] by the transposes of several w [out_i, in]: [N, sum of out_i]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: Product, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.product = product
        return product(x, torch.cat(weights))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        (gradient,) = gradients
        return _joint_gradients(ctx, gradient.contiguous(), x, weights)


def _joint_gradients(
    ctx: Any, gradient: torch.Tensor, x: torch.Tensor, weights: list[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, of the function `product` (None), and of each weight."""
    needs_x, _, *needs_weights = ctx.needs_input_grad[: 2 + len(weights)]
    of_x = ctx.product(gradient, torch.cat(weights).t()) if needs_x else None
    if not any(needs_weights):
        return (of_x, None, *(None for _ in weights))
    joint = ctx.product(gradient.t(), x.t())
    parts = joint.split([len(weight) for weight in weights])
    return (of_x, None, *(part if needed else None for part, needed in zip(parts, needs_weights, strict=True)))


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, product: Product, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        both = product(x, torch.cat([gate, up]))
        gated, linear = both.chunk(2, dim=-1)
        active = functional.silu(gated)
        ctx.save_for_backward(x, both, active, gate, up, down)
        ctx.product = product
        return product(active * linear, down)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, both, active, gate, up, down = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        gated, linear = both.chunk(2, dim=-1)
        of_down = ctx.product(gradient.t(), (active * linear).t()) if ctx.needs_input_grad[4] else None
        of_product = ctx.product(gradient, down.t())
        of_both = torch.empty_like(both)
        of_gated, of_linear = of_both.chunk(2, dim=-1)
        torch.mul(of_product, active, out=of_linear)
        torch.ops.aten.silu_backward.grad_input(of_product.mul_(linear), gated, grad_input=of_gated)
        return (*_joint_gradients(ctx, of_both, x, [gate, up]), of_down)


class _Rotate(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021): x cos + swap(x) sin, where `swap` exchanges the halves of a head."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return x.roll(x.shape[-1] // 2, -1).mul_(sin).addcmul_(x, cos)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (gradient,) = gradients
        swapped = (gradient * sin).roll(gradient.shape[-1] // 2, -1)
        return swapped.addcmul_(gradient, cos), None, None
