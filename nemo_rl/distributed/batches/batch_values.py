"""What `BatchedDataDict` does with one value, a tensor or a list: count, pick, join, gather and pickle its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist


def num_rows(key: str, value: object) -> int:
    """Size of the batch dimension. Raises `ValueError` for a value that has none."""
    if isinstance(value, torch.Tensor):
        if value.ndim == 0:
            raise ValueError(f"{key!r} is a tensor without dimensions; the first dimension must be the batch.")
        return value.shape[0]
    if isinstance(value, list | tuple):
        return len(value)
    raise ValueError(f"{key!r} is a {type(value).__name__}; a batch holds tensors and lists.")


def divided(count: int, what: str, parts: int, part_name: str) -> int:
    """`count / parts`, or a `ValueError` that names both when that is not a whole number."""
    if parts < 1:
        raise ValueError(f"The number of {part_name} must be at least 1, got {parts}.")
    if count % parts:
        raise ValueError(f"{count} {what} cannot be divided evenly by {parts} {part_name}.")
    return count // parts


def row_indices(indices: Sequence[int] | torch.Tensor, size: int) -> list[int]:
    """Indices or a boolean mask `[size]` as checked row numbers (`IndexError`, for a mask `ValueError`)."""
    if isinstance(indices, torch.Tensor):
        if indices.dtype == torch.bool:
            if indices.shape != (size,):
                raise ValueError(f"A mask for {size} rows must have the shape [{size}], got {list(indices.shape)}.")
            indices = indices.nonzero().view(-1)
        indices = indices.tolist()
    rows = list(indices)
    for row in rows:
        if not 0 <= row < size:
            raise IndexError(f"Row {row} is out of range for a batch of {size} rows.")
    return rows


def take(value: Any, rows: Sequence[int]) -> Any:
    """The given rows, in that order, as a new tensor or list."""
    if isinstance(value, torch.Tensor):
        return value.index_select(0, torch.tensor(rows, dtype=torch.long, device=value.device))
    return [value[row] for row in rows]


def join(key: str, values: Sequence[Any], pad_value: int | float | bool) -> Any:
    """All rows of `values`, in order; tensors are padded at the end of every dimension but the first to the largest."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        return [item for value in values for item in value]
    shapes = [list(value.shape) if isinstance(value, torch.Tensor) else f"list of {len(value)}" for value in values]
    if len(tensors) < len(values):
        raise ValueError(f"{key!r} is a tensor in some batches and a list in others: {shapes}.")
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise ValueError(f"{key!r} has different numbers of dimensions: sizes {shapes}.")
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"{key!r} has different dtypes: {[str(t.dtype) for t in tensors]} of sizes {shapes}.")
    rest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
    if all(list(tensor.shape[1:]) == rest for tensor in tensors):
        return torch.cat(tensors)
    joined = tensors[0].new_full((sum(len(tensor) for tensor in tensors), *rest), pad_value)
    start = 0
    for tensor in tensors:
        end = start + len(tensor)
        joined[(slice(start, end), *(slice(0, size) for size in tensor.shape[1:]))] = tensor
        start = end
    return joined


class Header(NamedTuple):
    """What a rank tells the others about one of its values before the tensors themselves are gathered."""

    shape: tuple[int, ...] | None  # None: not a tensor
    dtype: torch.dtype | None
    rows: Any  # the list itself


def header(value: Any) -> Header:
    """Describe a value; a list is its own description. Checks nothing: all ranks check all headers, and fail alike."""
    if isinstance(value, torch.Tensor):
        return Header(tuple(value.shape), value.dtype, None)
    return Header(None, None, value)


def gather_tensor(
    tensor: torch.Tensor, headers: Sequence[Header], group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """The tensor of each rank, as `headers` (one per rank) describe them. A collective."""
    sizes = [math.prod(of_rank.shape or ()) * (of_rank.dtype or tensor.dtype).itemsize for of_rank in headers]
    # Bytes, padded to the largest: backends gather equal sizes only, and not every dtype.
    sent = torch.zeros(max(sizes), dtype=torch.uint8, device=tensor.device)
    own = tensor.detach().contiguous().view(-1).view(torch.uint8)
    sent[: own.numel()] = own
    received = [torch.empty_like(sent) for _ in headers]
    if sent.numel():
        dist.all_gather(received, sent, group=group)
    return [
        part[:size].view(of_rank.dtype or tensor.dtype).view(of_rank.shape or ())
        for part, size, of_rank in zip(received, sizes, headers)
    ]


class PickledTensor(NamedTuple):
    """A CPU tensor as its own bytes: numpy pickles them out of band, and Ray then writes them straight to its store."""

    data: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]


def to_pickled(value: Any) -> Any:
    """A `PickledTensor` for a plain CPU tensor; any other value as it is. Gradients are not kept."""
    plain = isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided
    if not plain or type(value) is not torch.Tensor:
        return value
    flat = value.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return PickledTensor(flat.view(torch.uint8).numpy(), value.dtype, tuple(value.shape))


def from_pickled(value: Any) -> Any:
    """Inverse of `to_pickled`. The tensor has memory of its own: Ray's is shared between processes and read-only."""
    if not isinstance(value, PickledTensor):
        return value
    if value.data.size == 0:
        return torch.empty(value.shape, dtype=value.dtype)
    data = value.data if value.data.flags.writeable and value.data.flags.owndata else value.data.copy()
    return torch.from_numpy(data).view(value.dtype).view(value.shape)
