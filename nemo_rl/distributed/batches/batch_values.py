"""Operations of `BatchedDataDict` on one value, a tensor or a list: count, select, join, gather and pickle its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist


def num_rows(key: str, value: object) -> int:
    """Return the size of the batch dimension. Raises `ValueError` for a value without one."""
    if isinstance(value, torch.Tensor):
        if value.ndim == 0:
            raise ValueError(f"{key!r} is a tensor without dimensions; the first dimension must be the batch.")
        return value.shape[0]
    if isinstance(value, list | tuple):
        return len(value)
    raise ValueError(f"{key!r} is a {type(value).__name__}; a batch contains tensors and lists.")


def divided(count: int, what: str, parts: int, part_name: str) -> int:
    """Return `count / parts`. Raises `ValueError`, naming both, unless it is an integer."""
    if parts < 1:
        raise ValueError(f"The number of {part_name} must be at least 1, got {parts}.")
    if count % parts:
        raise ValueError(f"{count} {what} cannot be divided evenly by {parts} {part_name}.")
    return count // parts


def row_indices(indices: Sequence[int] | torch.Tensor, size: int) -> list[int]:
    """Return checked row numbers for indices (else `IndexError`) or a boolean mask `[size]` (else `ValueError`)."""
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
    """Return the given rows, in that order, as a new tensor or list."""
    if isinstance(value, torch.Tensor):
        return value.index_select(0, torch.tensor(rows, dtype=torch.long, device=value.device))
    return [value[row] for row in rows]


def join(key: str, values: Sequence[Any], pad_value: int | float | bool) -> Any:
    """Concatenate the rows of `values`, padding tensors at the end of all dimensions but the first to the largest."""
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
    """Describes a value of one rank to the other ranks before its tensor is gathered."""

    shape: tuple[int, ...] | None  # None for a list
    dtype: torch.dtype | None
    rows: Any  # the list; None for a tensor


def make_header(value: Any) -> Header:
    """Describe a value; the header of a list contains it. All ranks check all headers, so that all fail together."""
    if isinstance(value, torch.Tensor):
        return Header(tuple(value.shape), value.dtype, None)
    return Header(None, None, value)


def gather_tensor(
    tensor: torch.Tensor, headers: Sequence[Header], group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """Gather the tensor of each rank, as described by `headers` (one per rank). A collective."""
    sizes = [math.prod(header.shape or ()) * (header.dtype or tensor.dtype).itemsize for header in headers]
    # Gather bytes padded to the largest size, because backends require equal sizes and do not support every dtype.
    sent = torch.zeros(max(sizes), dtype=torch.uint8, device=tensor.device)
    local = tensor.detach().contiguous().view(-1).view(torch.uint8)
    sent[: local.numel()] = local
    received = [torch.empty_like(sent) for _ in headers]
    if sent.numel():
        dist.all_gather(received, sent, group=group)
    return [
        part[:size].view(header.dtype or tensor.dtype).view(header.shape or ())
        for part, size, header in zip(received, sizes, headers)
    ]


class PickledTensor(NamedTuple):
    """A CPU tensor as bytes: numpy pickles them out of band, and Ray writes them directly to its object store."""

    data: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]


def to_pickled(value: Any) -> Any:
    """Return a `PickledTensor` for a plain CPU tensor, any other value unchanged. Gradients are dropped."""
    is_plain = isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided
    if not is_plain or type(value) is not torch.Tensor:
        return value
    flat = value.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return PickledTensor(flat.view(torch.uint8).numpy(), value.dtype, tuple(value.shape))


def from_pickled(value: Any) -> Any:
    """Invert `to_pickled`. Copies the data, because Ray's memory is shared between processes and read-only."""
    if not isinstance(value, PickledTensor):
        return value
    if value.data.size == 0:
        return torch.empty(value.shape, dtype=value.dtype)
    data = value.data if value.data.flags.writeable and value.data.flags.owndata else value.data.copy()
    return torch.from_numpy(data).view(value.dtype).view(value.shape)
