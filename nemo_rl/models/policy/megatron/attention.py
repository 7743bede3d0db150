"""Attention and norm for megatron-core's layers without Transformer Engine or Apex.

megatron-core's `DotProductAttention` keeps all scores of a sequence in memory and supports neither packed sequences nor
context parallelism; its norm does not support sequence parallelism. The layer's specification replaces both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
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
    """RMS norm that Megatron's layers can build. Under sequence parallelism its gradient is summed over ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(nn.Module):
    """Computes causal attention with torch's `scaled_dot_product_attention` (flash attention if the device has it).

    Under context parallelism, rank i holds two chunks of each sequence, the i-th from the front and the i-th from the
    back (`context_order`). It gathers the keys and values of all ranks and attends with its own queries.
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
        mask = None
        if offset:
            rows = torch.arange(len(query), device=query.device)[:, None] + offset
            mask = torch.arange(len(key), device=query.device) <= rows
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
