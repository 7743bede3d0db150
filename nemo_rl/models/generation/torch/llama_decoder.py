"""A decoder in plain torch for Llama-like models: no modules, no hooks, no copies of the weights.

For a model of laptop size a step consists of dozens of tiny operations, so their number determines the time. q, k, v
are one matrix product, and so are gate, up: their weights are adjacent in the published buffer, so the fused weight is
a view. The product before a residual connection also adds the residual. Attention over a group of query heads is one
batched product with the group as rows, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from nemo_rl.models.generation.linear import linear_ops
from nemo_rl.models.generation.torch.decoder import Decoder, Decoding, PromptBatch, parameter_shapes
from nemo_rl.models.generation.torch.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """How a model family differs from Llama. Biases need no entry: they are used if the weights contain them."""

    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm=True),
}
_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True)
class _Layer:
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


@dataclass(frozen=True)
class _Weights:
    embedding: torch.Tensor
    layers: tuple[_Layer, ...]
    norm: torch.Tensor
    head: torch.Tensor


class LlamaDecoder(Decoder):
    """Decodes Llama, Qwen2 and dense Qwen3 models."""

    @staticmethod
    def supports(config: PretrainedConfig) -> bool:
        """Return whether this file computes exactly this model."""
        rope = getattr(config, "rope_parameters", None) or {}
        layer_types = getattr(config, "layer_types", None) or ["full_attention"]
        return (
            config.model_type in FAMILIES
            and getattr(config, "hidden_act", None) == "silu"
            and rope.get("rope_type", "default") in _STATIC_ROPE
            and rope.get("partial_rotary_factor", 1.0) == 1.0
            and not getattr(config, "use_sliding_window", False)
            and set(layer_types) == {"full_attention"}
        )

    def __init__(self, config: PretrainedConfig, device: torch.device, dtype: torch.dtype, max_length: int) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        with torch.device("meta"):
            super().__init__(*parameter_shapes(AutoModelForCausalLM.from_config(config)))
        self.device, self.dtype = device, dtype
        self._ops = linear_ops(device, dtype)
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        self.scale = self.head_dim**-0.5
        self.eps: float = config.rms_norm_eps
        self._family = FAMILIES[config.model_type]
        sizes = (config.hidden_size, self.head_dim)
        self._norm_floor = {size: torch.tensor((size * self.eps) ** 0.5, device=device) for size in sizes}
        positions = torch.arange(max_length)[None]
        rotary: Any = LlamaRotaryEmbedding(cast(Any, config))
        cos, sin = rotary(torch.zeros(1), positions)
        # rotate_half(x) * sin equals x with its halves swapped, times sin with its first half negated.
        half = self.head_dim // 2
        signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        self._cos, self._sin = (table.to(device, dtype) for table in (cos[0], signed))
        self._tensors: dict[str, torch.Tensor] = {}
        self._weights: _Weights | None = None

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        named = self._checked((name, tensor.to(self.device)) for name, tensor in tensors)
        layers = tuple(self._layer(named, f"model.layers.{index}.") for index in range(self.num_layers))
        embedding = named["model.embed_tokens.weight"]
        self._weights = _Weights(embedding, layers, named["model.norm.weight"], named.get("lm_head.weight", embedding))
        self._tensors = named

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._tensors.items()

    def _layer(self, tensors: dict[str, torch.Tensor], prefix: str) -> _Layer:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        projections = [f"{attention}{name}_proj." for name in "qkv"]
        gates = [f"{mlp}{name}_proj." for name in ("gate", "up")]
        return _Layer(
            input_norm=tensors[f"{prefix}input_layernorm.weight"],
            qkv=_fuse(tensors, [f"{name}weight" for name in projections]),
            qkv_bias=_fuse_if_present(tensors, [f"{name}bias" for name in projections]),
            q_norm=tensors[f"{attention}q_norm.weight"] if self._family.qk_norm else None,
            k_norm=tensors[f"{attention}k_norm.weight"] if self._family.qk_norm else None,
            out=tensors[f"{attention}o_proj.weight"],
            out_bias=tensors.get(f"{attention}o_proj.bias"),
            mlp_norm=tensors[f"{prefix}post_attention_layernorm.weight"],
            gate_up=_fuse(tensors, [f"{name}weight" for name in gates]),
            gate_up_bias=_fuse_if_present(tensors, [f"{name}bias" for name in gates]),
            down=tensors[f"{mlp}down_proj.weight"],
            down_bias=tensors.get(f"{mlp}down_proj.bias"),
        )

    def prefill(self, prompts: PromptBatch, copies: torch.Tensor, num_new: int) -> Decoding:
        assert self._weights is not None, "prefill before load"
        num_prompts, width = prompts.input_ids.shape
        cache = KVCache(
            self.num_layers,
            len(copies),
            self.num_kv_heads,
            width + num_new,
            self.head_dim,
            device=self.device,
            dtype=self.dtype,
        )
        mask = None
        if prompts.num_padding is None:
            cos, sin = self._cos[:width, None], self._sin[:width, None]
        else:
            columns = torch.arange(width, device=self.device)
            positions = (columns - prompts.num_padding[:, None]).clamp_(min=0)
            cos, sin = self._cos[positions][:, :, None], self._sin[positions][:, :, None]
            real = columns >= prompts.num_padding[:, None]
            # Padding attends to itself; otherwise its softmax would have nothing to normalise.
            mask = (real[:, None, :] & (columns <= columns[:, None])) | (columns == columns[:, None])
            mask = mask[:, None]
        hidden = F.embedding(prompts.input_ids.view(-1), self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            heads = self._qkv(hidden, layer).view(num_prompts, width, -1, self.head_dim)
            queries, keys, values = self._rotate(heads, layer, cos, sin)
            queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
            cache.write_prompts(index, keys, values, copies)
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            hidden = self._finish(hidden, attended.transpose(1, 2).reshape(len(hidden), -1), layer)
        last = hidden.view(num_prompts, width, -1)[:, -1]
        padding = None if prompts.num_padding is None else prompts.num_padding.index_select(0, copies)
        return LlamaDecoding(self, cache, self.logits(last).index_select(0, copies), width, padding)

    def forward_token(self, tokens: torch.Tensor, decoding: LlamaDecoding) -> torch.Tensor:
        """Append one token per row; returns logits [B, V]."""
        assert self._weights is not None
        column = decoding.column
        cos, sin = decoding.tables(self._cos, self._sin)
        mask, beta = (
            (decoding.mask[:, :, : column + 1], 1) if decoding.mask is not None else (self._cos.new_empty(1), 0)
        )
        num_rows = len(tokens)
        hidden = F.embedding(tokens, self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            heads = self._qkv(hidden, layer).view(num_rows, -1, self.head_dim)
            queries, new_keys, new_values = self._rotate(heads, layer, cos, sin)
            decoding.cache.append(index, column, new_keys, new_values)
            keys, values = decoding.cache.read(index, column + 1)
            grouped = queries.reshape(num_rows * self.num_kv_heads, -1, self.head_dim)
            scores = torch.baddbmm(mask, grouped, keys.transpose(1, 2), beta=beta, alpha=self.scale)
            weights = scores.softmax(-1, dtype=torch.float32).to(self.dtype)
            attended = torch.bmm(weights, values).view(num_rows, -1)
            hidden = self._finish(hidden, attended, layer)
        return self.logits(hidden)

    def _qkv(self, hidden: torch.Tensor, layer: _Layer) -> torch.Tensor:
        return self._ops.linear(self._norm(hidden, layer.input_norm), layer.qkv, layer.qkv_bias)

    def _rotate(
        self, heads: torch.Tensor, layer: _Layer, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split [..., heads + 2 kv_heads, head_dim]; rotate queries and keys by their positions (RoPE)."""
        num_rotated = self.num_heads + self.num_kv_heads
        rotated, values = heads[..., :num_rotated, :], heads[..., num_rotated:, :]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys = rotated[..., : self.num_heads, :], rotated[..., self.num_heads :, :]
            rotated = torch.cat([self._norm(queries, layer.q_norm), self._norm(keys, layer.k_norm)], dim=-2)
        swapped = rotated.roll(self.head_dim // 2, -1).mul_(sin)
        rotated = torch.addcmul(swapped, rotated, cos)
        return rotated[..., : self.num_heads, :], rotated[..., self.num_heads :, :], values

    def _finish(self, hidden: torch.Tensor, attended: torch.Tensor, layer: _Layer) -> torch.Tensor:
        """Compute the rest of a layer after attention: output projection and MLP, with residuals."""
        hidden = self._ops.linear_add(attended, layer.out, layer.out_bias, hidden)
        gate_up = self._ops.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up, layer.gate_up_bias)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._ops.linear_add(F.silu(gate).mul_(up), layer.down, layer.down_bias, hidden)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm: x / sqrt(mean(x^2) + eps) * weight, computed as x * sqrt(n) / sqrt(|x|^2 + n eps) * weight."""
        # On a CPU, torch's rms_norm takes nine operations and transformers' six; this takes four, two of them tiny.
        if self.dtype is torch.float32:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            num = x.shape[-1]
            return torch.div(x, length.hypot_(self._norm_floor[num]).mul_(num**-0.5)).mul_(weight)
        # As in transformers: normalised in float32, rounded, then scaled.
        return F.rms_norm(x.float(), weight.shape, None, self.eps).to(self.dtype).mul_(weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm and the head: [b, hidden] to [b, V] float32."""
        assert self._weights is not None
        return self._ops.linear(self._norm(hidden, self._weights.norm), self._weights.head, None).float()


class LlamaDecoding(Decoding):
    """Completes rows in a static cache; all rows are at the same column."""

    def __init__(
        self,
        decoder: LlamaDecoder,
        cache: KVCache,
        logits: torch.Tensor,
        column: int,
        num_padding: torch.Tensor | None,
    ) -> None:
        self._decoder = decoder
        self.cache = cache
        self.logits = logits
        self.column = column
        self._num_padding = num_padding
        self.mask: torch.Tensor | None = None
        self._make_mask()

    def _make_mask(self) -> None:
        """Set `mask` to [B * kv_heads, 1, columns]: minus infinity at padding, else 0."""
        if self._num_padding is None:
            return
        columns = torch.arange(self.cache.num_columns, device=self._num_padding.device)
        hidden = columns < self._num_padding.repeat_interleave(self._decoder.num_kv_heads)[:, None]
        mask = torch.zeros(hidden.shape, device=hidden.device, dtype=self._decoder.dtype)
        self.mask = mask.masked_fill_(hidden, float("-inf"))[:, None]

    def tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotary tables of the next column: [head_dim], or [B, 1, head_dim] if row positions differ."""
        if self._num_padding is None:
            return cos[self.column], sin[self.column]
        # Rows that have ended but are not dropped yet may be beyond the last position.
        positions = (self.column - self._num_padding).clamp_(max=len(cos) - 1)
        return cos[positions][:, None], sin[positions][:, None]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.logits = self._decoder.forward_token(tokens, self)
        self.column += 1
        return self.logits

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.keep(rows, self.column)
        self.logits = self.logits.index_select(0, rows)
        if self._num_padding is not None:
            self._num_padding = self._num_padding.index_select(0, rows)
            self._make_mask()


def _fuse_if_present(tensors: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor | None:
    return _fuse(tensors, names) if names[0] in tensors else None


def _fuse(tensors: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """Stack tensors along their first dimension: a view if they are adjacent in one buffer, else a copy.

    After a copy, `tensors` refers to it, so that the digest covers the memory that the products read.
    """
    parts = [tensors[name] for name in names]
    first = parts[0]
    end = first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != end:
            break
        end += part.numel()
    else:
        return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
    fused = torch.cat(parts)
    tensors.update(zip(names, fused.split([len(part) for part in parts]), strict=True))
    return fused
