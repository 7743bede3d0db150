"""Attention and norms for megatron-core's layers without Transformer Engine or Apex.

megatron-core's `DotProductAttention` keeps all scores of a sequence in memory and supports neither packed sequences nor
context parallelism; its norm does not support sequence parallelism. The layer's specification replaces both. Without
Transformer Engine, megatron-core also lacks a norm behind attention and MLP, and rotary frequencies per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import RowParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import nn


@dataclass
class PackedSequences(PackedSeqParams):
    """Describes sequences end to end in one row. `lengths` is on the host, so that no layer waits for the GPU."""

    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> PackedSequences:
        """Describe sequences of the given lengths."""
        bounds = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
        )


class RmsNorm(nn.RMSNorm):
    """RMS norm that Megatron's layers can build. Under sequence parallelism its gradient is summed over ranks.

    With `layernorm_zero_centered_gamma` it multiplies by 1 + weight, in float32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize [..., hidden_size] over the last dimension."""
        if not self._zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class NormedRowParallelLinear(RowParallelLinear):
    """Linear layer with split columns whose output is normalized after the sum over the ranks."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = RmsNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map [s, b, input_size / ranks] to [s, b, output_size], and no bias."""
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias


class TwoRopesSelfAttention(SelfAttention):
    """Self-attention in a model whose layers with a window have other rotary frequencies than those without.

    The model's table holds both (`model._rotary_frequencies`); every layer takes its columns.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, rotary_pos_emb: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; the last dimension of `rotary_pos_emb` is (2 halves, 2 types, width / 2)."""
        both = rotary_pos_emb.unflatten(-1, (2, 2, -1))
        table = both[..., int(_has_window(self.config, self.layer_number)), :].flatten(-2)
        return super().forward(hidden_states, *args, rotary_pos_emb=table, **options)


class CausalAttention(nn.Module):
    """Computes causal attention with torch's `scaled_dot_product_attention` (flash attention if the device has it).

    Under context parallelism, rank i holds two chunks of each sequence, the i-th from the front and the i-th from the
    back (`context_order`). It gathers the keys and values of all ranks and attends with its own queries.

    With `window_size` of the configuration, layers of `window_attn_skip_freq` attend to the last positions only.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert pg_collection is not None
        self._scale = softmax_scale
        self._window = config.window_size[0] + 1 if _has_window(config, layer_number) else None
        self._context = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return [s, b, heads * width] for queries [s, b, heads, width] and keys and values [s, b, groups, width].

        Packed: [t, heads * width] for [t, heads, width] and [t, groups, width].
        """
        if packed_seq_params is not None:
            lengths = packed_seq_params.lengths
            parts = zip(query.split(lengths), key.split(lengths), value.split(lengths))
            return torch.cat([self._attend(q[:, None], k[:, None], v[:, None])[:, 0] for q, k, v in parts])
        if self._context.size() == 1:
            return self._attend(query, key, value)
        order = context_order(key.shape[0] * self._context.size(), self._context.size()).to(key.device)
        full_key, full_value = (
            torch.empty_like(gathered).index_copy(0, order, gathered)
            for gathered in (gather_from_sequence_parallel_region(part, group=self._context) for part in (key, value))
        )
        front, back = query.chunk(2)
        rank, size = self._context.rank(), 2 * self._context.size()
        ends = [len(front) * (rank + 1), len(front) * (size - rank)]
        return torch.cat(
            [self._attend(part, full_key[:end], full_value[:end]) for part, end in zip((front, back), ends)]
        )

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend causally; the queries have the last positions of the keys."""
        offset = len(key) - len(query)
        window = len(key) if self._window is None else self._window
        mask = None
        if offset or window < len(key):
            rows = torch.arange(len(query), device=query.device)[:, None] + offset
            columns = torch.arange(len(key), device=query.device)
            mask = (columns <= rows) & (columns > rows - window)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return output.permute(2, 0, 1, 3).flatten(2)


def context_order(length: int, size: int) -> torch.Tensor:
    """Return [length] int64: the sequence positions that the context-parallel ranks hold, rank by rank.

    Example::

        context_order(8, 2)  # tensor([0, 1, 6, 7, 2, 3, 4, 5])
    """
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([torch.cat([chunks[rank], chunks[-1 - rank]]) for rank in range(size)])


def _has_window(config: TransformerConfig, layer_number: int) -> bool:
    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
