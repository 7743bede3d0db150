"""The layers of Llama-like models as functions of tensors, which run as TorchScript where torch can compile them.

With a model of laptop size, a decode step is a hundred operations of a few microseconds. In Python, calling them takes
as long as computing them, and two threads that decode half of the rows each would wait for the interpreter instead of
running at the same time.

TorchScript reads annotations as types, so this module has no `from __future__ import annotations`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nemo_rl.models.generation.linear import LinearOps
from nemo_rl.models.generation.sampling import draw_tokens
from nemo_rl.models.torchscript import compiled


class LayerWeights(NamedTuple):
    """Weights of one layer. q, k and v are stacked, and so are gate and up."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class LlamaWeights(NamedTuple):
    """Weights of a model."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor


class LayerCache(NamedTuple):
    """Keys and values of one layer: [B, kv_heads, T, head_dim], and views [B * kv_heads, T, head_dim] of the same."""

    keys: torch.Tensor
    values: torch.Tensor
    keys_by_head: torch.Tensor
    values_by_head: torch.Tensor


class LlamaConstants(NamedTuple):
    """What the layers depend on besides the weights.

    Attributes:
        num_heads, num_kv_heads, head_dim: of attention.
        eps: of the norms.
        norm_floors: sqrt(n * eps) for n = hidden size, and for n = head_dim, as scalars on the device.
        cos, sin: [positions, head_dim], the rotary tables. The first half of `sin` is negated: rotate_half(x) * sin
            equals x with its halves swapped, times this table.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    norm_floors: tuple[torch.Tensor, torch.Tensor]
    cos: torch.Tensor
    sin: torch.Tensor


class DecodingState(NamedTuple):
    """A model and B rows that it completes.

    Attributes:
        caches: keys and values of each layer.
        column: of the caches, where the next tokens go.
        num_padding: [B] int64, padding tokens before each row; None without padding.
        mask: [B * kv_heads, 1, columns], minus infinity at padding, else 0; None without padding.
    """

    weights: LlamaWeights
    constants: LlamaConstants
    caches: list[LayerCache]
    column: int
    num_padding: torch.Tensor | None
    mask: torch.Tensor | None


def norm(x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm: x / sqrt(mean(x^2) + eps) * weight, computed as x * sqrt(n) / sqrt(|x|^2 + n eps) * weight.

    `floor` is sqrt(n eps).
    """
    # On a CPU, torch's rms_norm takes nine operations and transformers' six; this takes four, two of them tiny.
    if x.dtype == torch.float32:
        length = torch.linalg.vector_norm(x, 2.0, [-1], True)
        return torch.div(x, length.hypot_(floor).mul_(x.shape[-1] ** -0.5)).mul_(weight)
    # As in transformers: normalised in float32, rounded, then scaled.
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype).mul_(weight)


def rotate(
    heads: torch.Tensor, layer: LayerWeights, cos: torch.Tensor, sin: torch.Tensor, constants: LlamaConstants
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split [..., heads + 2 kv_heads, head_dim]; rotate queries and keys by their positions (RoPE)."""
    num_rotated = constants.num_heads + constants.num_kv_heads
    rotated, values = heads[..., :num_rotated, :], heads[..., num_rotated:, :]
    q_norm, k_norm = layer.q_norm, layer.k_norm
    if q_norm is not None and k_norm is not None:
        queries, keys = rotated[..., : constants.num_heads, :], rotated[..., constants.num_heads :, :]
        floor = constants.norm_floors[1]
        rotated = torch.cat([norm(queries, q_norm, floor, constants.eps), norm(keys, k_norm, floor, constants.eps)], -2)
    swapped = rotated.roll(constants.head_dim // 2, -1).mul_(sin)
    rotated = torch.addcmul(swapped, rotated, cos)
    return rotated[..., : constants.num_heads, :], rotated[..., constants.num_heads :, :], values


@dataclass(frozen=True)
class LlamaFunctions:
    """The functions of `llama_functions`; see there."""

    prefill: Callable[..., torch.Tensor]
    step: Callable[..., torch.Tensor]
    step_and_draw: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool]]


def llama_functions(ops: LinearOps, *, compile_them: bool) -> LlamaFunctions:
    """Return the passes of a model with these matrix products.

    Raises:
        TorchScriptError: with `compile_them`, if torch cannot.
    """
    linear, linear_add = ops.linear, ops.linear_add

    def qkv(hidden: torch.Tensor, layer: LayerWeights, constants: LlamaConstants) -> torch.Tensor:
        # [N, hidden] to [N, heads + 2 kv_heads, head_dim].
        normal = norm(hidden, layer.input_norm, constants.norm_floors[0], constants.eps)
        return linear(normal, layer.qkv, layer.qkv_bias).view(len(hidden), -1, constants.head_dim)

    def finish(
        hidden: torch.Tensor, attended: torch.Tensor, layer: LayerWeights, constants: LlamaConstants
    ) -> torch.Tensor:
        # The rest of a layer after attention: output projection and MLP, with residuals.
        hidden = linear_add(attended, layer.out, layer.out_bias, hidden)
        normal = norm(hidden, layer.mlp_norm, constants.norm_floors[0], constants.eps)
        gate, up = linear(normal, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        return linear_add(F.silu(gate).mul_(up), layer.down, layer.down_bias, hidden)

    def logits(hidden: torch.Tensor, weights: LlamaWeights, constants: LlamaConstants) -> torch.Tensor:
        # The final norm and the head: [N, hidden] to [N, V] float32.
        return linear(norm(hidden, weights.norm, constants.norm_floors[0], constants.eps), weights.head, None).float()

    def prefill(
        input_ids: torch.Tensor,
        num_padding: torch.Tensor | None,
        copies: torch.Tensor,
        weights: LlamaWeights,
        caches: list[LayerCache],
        constants: LlamaConstants,
    ) -> torch.Tensor:
        # Read prompts [U, P], padded on the left; write columns 0..P-1 of row b from prompt copies[b]; returns the
        # logits of the next token of each prompt, [U, V].
        num_prompts, width = input_ids.shape
        cos, sin = constants.cos[:width, None], constants.sin[:width, None]
        mask: torch.Tensor | None = None
        if num_padding is not None:
            columns = torch.arange(width, device=input_ids.device)
            positions = (columns - num_padding[:, None]).clamp_(min=0)
            cos, sin = constants.cos[positions][:, :, None], constants.sin[positions][:, :, None]
            real = columns >= num_padding[:, None]
            # Padding attends to itself; otherwise its softmax would have nothing to normalise.
            mask = (real[:, None, :] & (columns <= columns[:, None])) | (columns == columns[:, None])
            mask = mask[:, None]
        hidden = F.embedding(input_ids.view(-1), weights.embedding)
        for index in range(len(weights.layers)):
            layer, cache = weights.layers[index], caches[index]
            heads = qkv(hidden, layer, constants).view(num_prompts, width, -1, constants.head_dim)
            queries, keys, values = rotate(heads, layer, cos, sin, constants)
            queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
            cache.keys[:, :, :width].copy_(keys.index_select(0, copies))
            cache.values[:, :, :width].copy_(values.index_select(0, copies))
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            hidden = finish(hidden, attended.transpose(1, 2).reshape(len(hidden), -1), layer, constants)
        return logits(hidden.view(num_prompts, width, -1)[:, -1], weights, constants)

    def step(tokens: torch.Tensor, state: DecodingState) -> torch.Tensor:
        # Append tokens [B] to the rows of a decoding; returns the logits of the next tokens, [B, V].
        weights, constants, column = state.weights, state.constants, state.column
        num_padding, mask = state.num_padding, state.mask
        num_rows = len(tokens)
        if num_padding is None:
            cos, sin = constants.cos[column], constants.sin[column]
        else:
            # Rows that have ended but are not dropped yet may be beyond the last position.
            positions = (column - num_padding).clamp_(max=len(constants.cos) - 1)
            cos, sin = constants.cos[positions][:, None], constants.sin[positions][:, None]
        hidden = F.embedding(tokens, weights.embedding)
        beta = 0.0
        bias = cos.new_empty([1])
        if mask is not None:
            beta = 1.0
            bias = mask[:, :, : column + 1]
        for index in range(len(weights.layers)):
            layer, cache = weights.layers[index], state.caches[index]
            queries, keys, values = rotate(qkv(hidden, layer, constants), layer, cos, sin, constants)
            cache.keys[:, :, column].copy_(keys)
            cache.values[:, :, column].copy_(values)
            grouped = queries.reshape(num_rows * constants.num_kv_heads, -1, constants.head_dim)
            known = cache.keys_by_head[:, : column + 1]
            scores = torch.baddbmm(bias, grouped, known.transpose(1, 2), beta=beta, alpha=constants.head_dim**-0.5)
            shares = torch.softmax(scores, -1, torch.float32).to(hidden.dtype)
            attended = torch.bmm(shares, cache.values_by_head[:, : column + 1]).view(num_rows, -1)
            hidden = finish(hidden, attended, layer, constants)
        return logits(hidden, weights, constants)

    def step_and_draw(
        tokens: torch.Tensor,
        state: DecodingState,
        uniforms: torch.Tensor,
        temperature: float,
        greedy: bool,
        stop_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        # `step`, then `draw_tokens`: the logits and what it returns, and whether a drawn token is in `stop_ids`.
        result = step(tokens, state)
        drawn, logprobs, sampling_logprobs = draw_tokens(result, uniforms, temperature, greedy)
        has_stop = bool(torch.isin(drawn, stop_ids).any())
        return result, drawn, logprobs, sampling_logprobs, has_stop

    if compile_them:
        return LlamaFunctions(compiled(prefill), compiled(step), compiled(step_and_draw))
    return LlamaFunctions(prefill, step, step_and_draw)
