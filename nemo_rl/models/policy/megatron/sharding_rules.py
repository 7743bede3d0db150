"""How one Megatron parameter is made of Hugging Face tensors, for any tensor-parallel size, and back, bit for bit.

A rule turns tensors of the Hugging Face model into all tensor-parallel shards of the Megatron parameter, stacked
along a new first dimension, and takes them apart again. It only moves elements, so it serves weights and the
optimizer's moments alike, on any device; on the meta device it gives shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class ModelShape:
    """What rules must know of the model besides the tensors: its key-value heads, and the tensor-parallel size."""

    num_query_groups: int
    tensor_parallel_size: int


class Rule(ABC):
    """One Megatron parameter, made of the Hugging Face tensors `names`, in the order that `shards` takes them."""

    # Whether tensor-parallel ranks hold different parts of it.
    split: ClassVar[bool] = True

    def __init__(self, *names: str) -> None:
        self.names = names

    @abstractmethod
    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        """[tensor-parallel size, *shape of a shard]; size 1 where it is not split."""

    @abstractmethod
    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        """The inverse of `shards`; `shapes` are those of the Hugging Face tensors."""


class Replicated(Rule):
    """The same on all tensor-parallel ranks."""

    split = False

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        (tensor,) = tensors
        return tensor[None]

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        return [shards[0]]


class SplitColumns(Rule):
    """Each rank has its share of the columns (inputs of a matrix)."""

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        (tensor,) = tensors
        return tensor.unflatten(1, (shape.tensor_parallel_size, -1)).transpose(0, 1)

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        return [shards.transpose(0, 1).flatten(1, 2)]


class SplitVocabulary(Rule):
    """Each rank has its share of the vocabulary, which is padded with rows of zeros until it divides evenly."""

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        (tensor,) = tensors
        missing = padded_vocabulary(len(tensor), shape.tensor_parallel_size) - len(tensor)
        padded = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
        return padded.unflatten(0, (shape.tensor_parallel_size, -1))

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        return [shards.flatten(0, 1)[: shapes[0][0]]]


class SplitGated(Rule):
    """Gate and up projection of a gated MLP: each rank has its share of the gate's rows, then of the other's."""

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        return torch.cat([tensor.unflatten(0, (shape.tensor_parallel_size, -1)) for tensor in tensors], dim=1)

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        return [part.flatten(0, 1) for part in shards.chunk(len(shapes), dim=1)]


class SplitAttention(Rule):
    """Query, key and value projections: group by group its query heads, its key head, its value head; then split."""

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        groups = [tensor.unflatten(0, (shape.num_query_groups, -1)) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1).unflatten(0, (shape.tensor_parallel_size, -1))

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        groups = shards.flatten(0, 1).unflatten(0, (shape.num_query_groups, -1))
        sizes = [rows[0] // shape.num_query_groups for rows in shapes]
        return [part.flatten(0, 1) for part in groups.split(sizes, dim=1)]


def padded_vocabulary(size: int, tensor_parallel_size: int) -> int:
    """The next multiple of the tensor-parallel size."""
    return -(-size // tensor_parallel_size) * tensor_parallel_size
