"""The key-value cache of the Llama decoder, allocated once for the longest completion."""

from __future__ import annotations

import torch

from nemo_rl.models.generation.torch.llama_layers import LayerCache


class KVCache:
    """Stores the keys and values of all layers in one static buffer.

    Keys and values of a layer are [B * kv_heads, T, head_dim]: batch and heads form one dimension of a batched matrix
    product, and the first t columns are a view. The next column is the same for all rows.

    Attributes:
        layers: views of each layer.
        num_columns: T.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        num_columns: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._kv_heads = num_kv_heads
        shape = (num_layers, 2, num_rows, num_kv_heads, num_columns, head_dim)
        self._allocate(torch.empty(shape, device=device, dtype=dtype))

    def _allocate(self, data: torch.Tensor) -> None:
        self._data = data
        layers, _, _, _, columns, head_dim = data.shape
        self.num_columns = columns
        flat = data.view(layers, 2, -1, columns, head_dim)
        # A view costs a microsecond, so the views that do not depend on the column are made once.
        self.layers = [LayerCache(*data[layer], *flat[layer]) for layer in range(layers)]

    def keep(self, rows: torch.Tensor, num_columns: int) -> None:
        """Drop all other rows. Columns from `num_columns` on are not written yet."""
        layers, two, _, heads, columns, head_dim = self._data.shape
        kept = self._data.new_empty(layers, two, len(rows), heads, columns, head_dim)
        kept[..., :num_columns, :] = self._data[..., :num_columns, :].index_select(2, rows)
        self._allocate(kept)
