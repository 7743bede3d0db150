"""The functions of `cpu_layers` and their gradients, which run as TorchScript where torch can compile them.

x is [N, hidden], weights are [out, in]. A norm is given by its weight [hidden], or None for no norm. Functions whose
names end in `gradients` take the gradient of the result first, and return those of the arguments, or None where they
are not needed.

TorchScript reads annotations as types, so this module has no `from __future__ import annotations`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nemo_rl.models.policy.sequence_layouts import PaddedSequences, SharedPrefixes
from nemo_rl.models.torchscript import compiled


@dataclass(frozen=True)
class Products:
    """Matrix products without gradient.

    Attributes:
        product: x [N, in] times the transpose of w [out, in].
        product_add: the same, and a residual [N, out] that is added: (x, w, residual).
    """

    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    product_add: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _plain_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t()


def _plain_product_add(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return torch.addmm(residual, x, w.t())


PLAIN_PRODUCTS = Products(_plain_product, _plain_product_add)


def large_products(linears: tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]], least: int) -> Products:
    """Return products that use `linear` and `linear_add` of `models.onednn` for at least `least` multiplications."""
    linear, linear_add = linears

    def product(x: torch.Tensor, w: torch.Tensor, least: int = least) -> torch.Tensor:
        if x.shape[0] * x.shape[1] * w.shape[0] >= least:
            return linear(x, w, None)
        return x @ w.t()

    def product_add(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor, least: int = least) -> torch.Tensor:
        if x.shape[0] * x.shape[1] * w.shape[0] >= least:
            return linear_add(x, w, None, residual)
        return torch.addmm(residual, x, w.t())

    return Products(product, product_add)


def norm(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x / sqrt(mean(x^2) + eps), and the factor of each row."""
    length = torch.linalg.vector_norm(x, 2.0, [-1], True)
    inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def norm_gradients(
    gradient: torch.Tensor, normal: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and of the weight of an RMS norm, from what `norm` returned."""
    along_normal = gradient * normal
    weight_gradient = along_normal.reshape(-1, along_normal.shape[-1]).sum(0)
    # d/dx: (g w - n mean(g w n)) / rms
    along = torch.matmul(along_normal, weight).div_(along_normal.shape[-1]).unsqueeze(-1)
    return torch.mul(gradient, weight).addcmul_(normal, along, value=-1.0).mul_(inverse), weight_gradient


def scaled(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Return x times the weight of its norm, if there is one."""
    return x if weight is None else x * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x cos + swap(x) sin, where `swap` exchanges the halves of a head: [..., head_dim]."""
    return x.roll(x.shape[-1] // 2, -1).mul_(sin).addcmul_(x, cos)


def rotate_gradients(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x in `rotate`."""
    return (gradient * sin).roll(gradient.shape[-1] // 2, -1).addcmul_(gradient, cos)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    max_short: int,
) -> torch.Tensor:
    """Attend with [B, heads, T, D] queries to [B, kv_heads, S, D] keys; returns [B, T, heads, D].

    `mask` is [B or 1, 1, T, S] bool, or None for causal attention among T = S tokens. With more than `max_short` keys,
    this never holds all scores.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    if num_keys > max_short:
        result = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=group > 1
        )
        return result.transpose(1, 2).contiguous()
    if mask is None:
        mask = torch.ones([1, 1, length, num_keys], dtype=torch.bool, device=query.device).tril()
    # Not minus infinity: padding that attends to nothing would become NaN, and so would all gradients.
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -3.4028234663852886e38)
    # The heads of a group share keys, so they are additional rows of one product.
    bias = bias.expand(-1, group, -1, -1).reshape(-1, 1, group * length, num_keys)
    if len(bias) > 1:
        bias = bias.expand(-1, kv_heads, -1, -1)
    scores = torch.baddbmm(
        bias.reshape(-1, group * length, num_keys),
        query.reshape(batch * kv_heads, group * length, head_dim),
        key.reshape(batch * kv_heads, num_keys, head_dim).transpose(1, 2),
        alpha=scale,
    )
    attended = torch.bmm(scores.softmax(-1), value.reshape(batch * kv_heads, num_keys, head_dim))
    return attended.view(batch, heads, length, head_dim).transpose(1, 2).contiguous()


def attend_shared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SharedPrefixes,
    scale: float,
    max_short: int,
) -> torch.Tensor:
    """Attend in a row of T tokens with shared prefixes: [1, heads, T, D] to [1, kv_heads, T, D]; [1, T, heads, D]."""
    prefixes, continuations = layout.prefixes, layout.continuations
    count = len(prefixes.position)
    prefix_key, prefix_value = pad(prefixes, key[:, :, :count]), pad(prefixes, value[:, :, :count])
    attended = unpad(
        prefixes, attend(pad(prefixes, query[:, :, :count]), prefix_key, prefix_value, None, scale, max_short)
    )
    if continuations is None:
        return attended
    key, value = pad(continuations, key[:, :, count:]), pad(continuations, value[:, :, count:])
    key = torch.cat([prefix_key.index_select(0, layout.prefix), key], 2)
    value = torch.cat([prefix_value.index_select(0, layout.prefix), value], 2)
    continued = attend(pad(continuations, query[:, :, count:]), key, value, layout.mask, scale, max_short)
    return torch.cat([attended, unpad(continuations, continued)], 1)


@dataclass(frozen=True)
class LayerFunctions:
    """The functions of `layer_functions`; see there."""

    norm: Callable[..., Any]
    norm_gradients: Callable[..., Any]
    joint: Callable[..., Any]
    joint_gradients: Callable[..., Any]
    product_add: Callable[..., Any]
    product_gradients: Callable[..., Any]
    mlp: Callable[..., Any]
    mlp_gradients: Callable[..., Any]
    rotate: Callable[..., Any]
    rotate_gradients: Callable[..., Any]
    attend: Callable[..., Any]
    attend_shared: Callable[..., Any]


def layer_functions(products: Products, *, compile_them: bool) -> LayerFunctions:
    """Return the functions with these matrix products.

    Raises:
        TorchScriptError: with `compile_them`, if torch cannot.
    """
    product, product_add = products.product, products.product_add

    def joint(
        x: torch.Tensor, norm_weight: torch.Tensor | None, eps: float, weights: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        # The (normalized) x times the transposes of all weights: [N, sum of out]; and what the gradients need.
        inverse: torch.Tensor | None = None
        if norm_weight is not None:
            x, inverse = norm(x, eps)
        return product(scaled(x, norm_weight), torch.cat(weights)), x, inverse

    def joint_gradients(
        gradient: torch.Tensor,
        x: torch.Tensor,
        inverse: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        weights: list[torch.Tensor],
        needs_x: bool,
        needs_weights: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        # Of x, of the norm's weight, and of all weights together.
        gradient = gradient.contiguous()
        of_weights: torch.Tensor | None = None
        if needs_weights:
            of_weights = product(gradient.t(), scaled(x, norm_weight).t())
        if not needs_x:
            return None, None, of_weights
        of_x = product(gradient, torch.cat(weights).t())
        if norm_weight is None or inverse is None:
            return of_x, None, of_weights
        of_x, of_norm = norm_gradients(of_x, x, inverse, norm_weight)
        return of_x, of_norm, of_weights

    def product_gradients(
        gradient: torch.Tensor, x: torch.Tensor, w: torch.Tensor, needs_x: bool, needs_w: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        # Of x and w; that of the residual is the gradient itself.
        gradient = gradient.contiguous()
        of_x: torch.Tensor | None = None
        of_w: torch.Tensor | None = None
        if needs_x:
            of_x = product(gradient, w.t())
        if needs_w:
            of_w = product(gradient.t(), x.t())
        return of_x, of_w

    def mlp(
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        eps: float,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        # down(silu(gate(x)) * up(x)); with a norm, x + that of the normalized x. And what the gradients need.
        both, normal, inverse = joint(x, norm_weight, eps, [gate, up])
        gated, linear = both.chunk(2, -1)
        active = F.silu(gated)
        if norm_weight is None:
            return product(active * linear, down), normal, inverse, both, active
        return product_add(active * linear, down, x), normal, inverse, both, active

    def mlp_gradients(
        gradient: torch.Tensor,
        normal: torch.Tensor,
        inverse: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        both: torch.Tensor,
        active: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        needs_x: bool,
        needs_both: bool,
        needs_down: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        # Of x, of the norm's weight, of gate and up together, of down.
        gradient = gradient.contiguous()
        gated, linear = both.chunk(2, -1)
        of_down: torch.Tensor | None = None
        if needs_down:
            of_down = product(gradient.t(), (active * linear).t())
        of_product = product(gradient, down.t())
        of_both = torch.empty_like(both)
        of_gated, of_linear = of_both.chunk(2, -1)
        torch.mul(of_product, active, out=of_linear)
        torch.ops.aten.silu_backward(of_product.mul_(linear), gated, grad_input=of_gated)
        of_x, of_norm, of_gate_up = joint_gradients(
            of_both, normal, inverse, norm_weight, [gate, up], needs_x, needs_both
        )
        if of_x is not None and norm_weight is not None:
            of_x = of_x.add_(gradient)
        return of_x, of_norm, of_gate_up, of_down

    functions: dict[str, Callable[..., Any]] = {
        "norm": norm,
        "norm_gradients": norm_gradients,
        "joint": joint,
        "joint_gradients": joint_gradients,
        "product_add": product_add,
        "product_gradients": product_gradients,
        "mlp": mlp,
        "mlp_gradients": mlp_gradients,
        "rotate": rotate,
        "rotate_gradients": rotate_gradients,
        "attend": attend,
        "attend_shared": attend_shared,
    }
    if compile_them:
        functions = {name: compiled(function) for name, function in functions.items()}
    return LayerFunctions(**functions)


def pad(layout: PaddedSequences, tensor: torch.Tensor) -> torch.Tensor:
    """Map the T tokens of a row, [1, heads, T, D], to a padded batch, [N, heads, L, D], with 0 as padding."""
    tokens = tensor[0].transpose(0, 1)
    shape = [layout.num_sequences, layout.longest, tensor.shape[1], tensor.shape[3]]
    if len(layout.position) == layout.num_sequences * layout.longest:  # no padding: the batch is a view
        return tokens.reshape(shape).transpose(1, 2)
    padded = tensor.new_zeros(shape).index_put([layout.sequence, layout.position], tokens)
    return padded.transpose(1, 2)


def unpad(layout: PaddedSequences, tensor: torch.Tensor) -> torch.Tensor:
    """Map a padded batch, [N, L, heads, D], to the tokens of a row, [1, T, heads, D]."""
    if len(layout.position) == layout.num_sequences * layout.longest:
        return tensor.flatten(0, 1)[None]
    return tensor[layout.sequence, layout.position][None]
