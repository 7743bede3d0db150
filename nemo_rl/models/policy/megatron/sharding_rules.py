"""Rules that convert Hugging Face tensors to one Megatron parameter and back, exactly, for any parallel sizes.

A rule converts tensors of the Hugging Face model to all tensor-parallel (for experts: expert-parallel) shards of the
Megatron parameter, stacked along a new first dimension, and inverts the conversion. It only moves elements, so it
applies to weights and to the optimizer's moments, on any device; on the meta device it computes shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class ModelShape:
    """The sizes that rules need besides the tensors: the number of key-value heads, and the parallel sizes."""

    num_query_groups: int
    tensor_parallel_size: int
    expert_parallel_size: int = 1


class Rule(ABC):
    """Converts the Hugging Face tensors `names`, in this order, to one Megatron parameter and back."""

    # Whether tensor-parallel ranks (for experts: expert-parallel ranks) hold different parts of the parameter.
    split: ClassVar[bool] = True
    of_experts: ClassVar[bool] = False

    def __init__(self, *names: str) -> None:
        self.names = names

    @abstractmethod
    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        """Return [parallel size, *shape of a shard]; the first dimension is 1 if the parameter is not split."""

    @abstractmethod
    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        """Invert `shards`; `shapes` are the shapes of the Hugging Face tensors."""


class Replicated(Rule):
    """Replicates the tensor on all tensor-parallel ranks."""

    split = False

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        (tensor,) = tensors
        return tensor[None]

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        return [shards[0]]


class SplitColumns(Rule):
    """Splits the columns (the inputs of a matrix) over the ranks."""

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        (tensor,) = tensors
        return tensor.unflatten(1, (shape.tensor_parallel_size, -1)).transpose(0, 1)

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        return [shards.transpose(0, 1).flatten(1, 2)]


class SplitVocabulary(Rule):
    """Splits the vocabulary over the ranks, after padding it with rows of zeros to a multiple of them."""

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        (tensor,) = tensors
        num_padding = padded_vocabulary(len(tensor), shape.tensor_parallel_size) - len(tensor)
        padded = torch.cat([tensor, tensor.new_zeros(num_padding, *tensor.shape[1:])]) if num_padding else tensor
        return padded.unflatten(0, (shape.tensor_parallel_size, -1))

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        return [shards.flatten(0, 1)[: shapes[0][0]]]


class SplitGated(Rule):
    """Splits the gate and up projections of a gated MLP: a rank has its rows of the gate, then its rows of up."""

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        return torch.cat([tensor.unflatten(0, (shape.tensor_parallel_size, -1)) for tensor in tensors], dim=1)

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        return [part.flatten(0, 1) for part in shards.chunk(len(shapes), dim=1)]


class SplitAttention(Rule):
    """Interleaves query, key and value projections by group (query heads, key head, value head) and splits groups."""

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        groups = [tensor.unflatten(0, (shape.num_query_groups, -1)) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1).unflatten(0, (shape.tensor_parallel_size, -1))

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        groups = shards.flatten(0, 1).unflatten(0, (shape.num_query_groups, -1))
        sizes = [rows[0] // shape.num_query_groups for rows in shapes]
        return [part.flatten(0, 1) for part in groups.split(sizes, dim=1)]


class SplitExperts(Rule):
    """Splits experts, which are stacked along the first dimension, over the expert-parallel ranks."""

    of_experts = True

    def shards(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        (tensor,) = tensors
        return tensor.unflatten(0, (shape.expert_parallel_size, -1))

    def tensors(self, shards: torch.Tensor, shapes: Sequence[torch.Size], shape: ModelShape) -> list[torch.Tensor]:
        return [shards.flatten(0, 1)]


def padded_vocabulary(size: int, tensor_parallel_size: int) -> int:
    """Round the vocabulary size up to a multiple of the tensor-parallel size.

    Example:
        >>> padded_vocabulary(29, 4)
        32
    """
    return -(-size // tensor_parallel_size) * tensor_parallel_size
