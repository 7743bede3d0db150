"""A batch as a dict of tensors and lists, with methods to shard it over workers and to join the parts.

For Ray, CPU tensors are pickled out of band as raw bytes. A view takes only the bytes of its rows (torch would pickle
the complete storage behind it). A worker receives a private copy, which it may modify in place.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias, overload

import torch
import torch.distributed as dist

from nemo_rl.distributed.batches.batch_values import (
    divided,
    from_pickled,
    gather_tensor,
    join,
    make_header,
    num_rows,
    row_indices,
    take,
    to_pickled,
)
from nemo_rl.distributed.batches.sequence_packing import (
    DynamicBatchingArgs,
    Microbatch,
    MicrobatchPlan,
    SequencePackingArgs,
    parse_args,
    plan_batches,
)

DynamicBatching: TypeAlias = DynamicBatchingArgs | Mapping[str, Any]
SequencePacking: TypeAlias = SequencePackingArgs | Mapping[str, Any]
PadValues: TypeAlias = Mapping[str, int | float | bool]


class BatchedDataDict(dict[str, Any]):
    """Holds a batch as a dict of tensors (batch first) and lists that have the same number of rows.

    Values are checked when the batch is used, not when they are inserted; the `ValueError` names keys and sizes.

    Example:

        >>> batch = BatchedDataDict(ids=torch.arange(8).view(4, 2), text=["a", "b", "c", "d"])
        >>> batch.size
        4
        >>> first, second = batch.shard_by_batch_size(2)
        >>> second["text"]
        ['c', 'd']
        >>> BatchedDataDict.from_batches([second, first])["ids"].tolist()
        [[4, 5], [6, 7], [0, 1], [2, 3]]
        >>> [part["text"] for part in batch.make_microbatch_iterator(2)]
        [['a', 'b'], ['c', 'd']]

    Attributes:
        microbatch_plan: the micro-batches of a shard made with dynamic batching or sequence packing, else None.
    """

    microbatch_plan: MicrobatchPlan | None = None

    # --- rows and keys ----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of rows; 0 for a batch without keys. Raises `ValueError` if the keys have different numbers."""
        sizes = {key: num_rows(key, value) for key, value in self.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"All values of a batch must have the same number of rows, got {sizes}.")
        return next(iter(sizes.values()), 0)

    def get_dict(self) -> dict[str, Any]:
        """Return the keys and values as a plain dict."""
        return dict(self)

    def copy(self) -> Self:
        """Return a batch of the same type that shares the values."""
        new = type(self)(self)
        new.microbatch_plan = self.microbatch_plan
        return new

    __copy__ = copy

    def slice(self, start: int, end: int) -> SlicedDataDict:
        """Return rows `start:end`; tensors are views. Raises `IndexError` unless `0 <= start <= end <= size`."""
        if not 0 <= start <= end <= self.size:
            raise IndexError(f"Rows {start}:{end} are out of range for a batch of {self.size} rows.")
        return SlicedDataDict({key: value[start:end] for key, value in self.items()})

    def select_indices(self, indices: Sequence[int] | torch.Tensor) -> Self:
        """Return the rows at `indices` (integers in any order, or a boolean mask `[size]`); tensors are copies."""
        return type(self)(self._rows(row_indices(indices, self.size)))

    def select_keys(self, *keys: str) -> Self:
        """Return a batch with only these keys, sharing the values. Raises `ValueError` for a missing key."""
        missing = [key for key in keys if key not in self]
        if missing:
            raise ValueError(f"The batch has no keys {missing}, only {sorted(self)}.")
        return type(self)({key: self[key] for key in keys})

    def chunk(self, rank: int, chunks: int) -> SlicedDataDict:
        """Return the `rank`-th of `chunks` contiguous parts of equal size; tensors are views.

        Raises:
            ValueError: the number of rows is not divisible by `chunks`.
            IndexError: `rank` is not in `0 <= rank < chunks`.
        """
        size = divided(self.size, "rows", chunks, "chunks")
        if not 0 <= rank < chunks:
            raise IndexError(f"Chunk {rank} is out of range for {chunks} chunks.")
        return self.slice(rank * size, (rank + 1) * size)

    def get_batch(self, batch_idx: int, batch_size: int | None = None) -> SlicedDataDict:
        """Return this shard's rows of global batch `batch_idx`, with their micro-batches.

        Args:
            batch_idx: index of the global batch.
            batch_size: rows per global batch *in this shard*; not needed with a micro-batch plan.
        """
        plan = self.microbatch_plan
        if plan is None:
            if batch_size is None:
                raise ValueError("get_batch needs batch_size: this batch has no micro-batch plan.")
            return self.slice(batch_idx * batch_size, (batch_idx + 1) * batch_size)
        if not 0 <= batch_idx < len(plan.batches):
            raise IndexError(f"Global batch {batch_idx} is out of range: this shard has {len(plan.batches)}.")
        start = sum(plan.num_rows(i) for i in range(batch_idx))
        part = self.slice(start, start + plan.num_rows(batch_idx))
        part.microbatch_plan = MicrobatchPlan(plan.packed, plan.input_key, (plan.batches[batch_idx],))
        return part

    # --- joining ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_batches(cls, batches: Iterable[Mapping[str, Any]], pad_value_dict: PadValues | None = None) -> Self:
        """Return the rows of all batches, in order.

        If tensors differ in a dimension other than the batch, they are padded at its end to the largest size, with
        `pad_value_dict[key]`, or 0.

        Raises:
            ValueError: there is no batch, the keys differ, or the values of a key cannot be joined (a tensor and a
                list, different dtypes or numbers of dimensions); names the key and the sizes.
        """
        parts = [batch if isinstance(batch, BatchedDataDict) else BatchedDataDict(batch) for batch in batches]
        if not parts:
            raise ValueError("from_batches needs at least one batch.")
        for position, part in enumerate(parts):
            different = sorted(part.keys() ^ parts[0].keys())
            if different:
                raise ValueError(f"Batch {position} and batch 0 have different keys; only one of them has {different}.")
            _ = part.size
        pad_values = pad_value_dict or {}
        return cls({key: join(key, [part[key] for part in parts], pad_values.get(key, 0)) for key in parts[0]})

    def repeat_interleave(self, num_repeats: int) -> Self:
        """Return each row `num_repeats` times in succession. List items are deep copies, so repeats are independent."""
        _ = self.size
        if num_repeats < 0:
            raise ValueError(f"num_repeats must be at least 0, got {num_repeats}.")
        return type(self)(
            {
                key: value.repeat_interleave(num_repeats, dim=0)
                if isinstance(value, torch.Tensor)
                else [copy.deepcopy(item) for item in value for _ in range(num_repeats)]
                for key, value in self.items()
            }
        )

    def all_gather(
        self, group: dist.ProcessGroup | None = None, pad_value_dict: PadValues | None = None
    ) -> BatchedDataDict:
        """Return the rows of all ranks of `group` in rank order. This is a collective: every rank must call it.

        Batch sizes and sequence lengths may differ between ranks. Padding is as in `from_batches`, whose `ValueError`
        is raised on all ranks. Tensors must be on a device that the group's backend supports (NCCL: the GPU).
        """
        headers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(headers, {key: make_header(value) for key, value in self.items()}, group=group)
        # If ranks disagree on which values are tensors, all must fail here, before they wait for each other.
        kinds = [
            {key: "list" if header.shape is None else "tensor" for key, header in rank_headers.items()}
            for rank_headers in headers
        ]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"all_gather needs the same keys and kinds of values on all ranks, got {kinds}.")
        ranks: list[dict[str, Any]] = [{} for _ in headers]
        # All ranks must gather the tensors in the same order: that of rank 0's keys.
        for key, kind in kinds[0].items():
            key_headers = [rank_headers[key] for rank_headers in headers]
            if kind == "tensor":
                values = gather_tensor(self[key], key_headers, group)
            else:
                values = [header.rows for header in key_headers]
            for rank, value in enumerate(values):
                ranks[rank][key] = value
        return BatchedDataDict.from_batches(ranks, pad_value_dict)

    # --- sharding ---------------------------------------------------------------------------------------------------

    @overload
    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        *,
        rows_per_group: int = 1,
    ) -> list[SlicedDataDict]: ...
    @overload
    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        *,
        dynamic_batching_args: DynamicBatching,
        rows_per_group: int = 1,
    ) -> tuple[list[SlicedDataDict], list[int]]: ...
    @overload
    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        *,
        sequence_packing_args: SequencePacking,
        rows_per_group: int = 1,
    ) -> tuple[list[SlicedDataDict], list[int]]: ...
    @overload
    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        dynamic_batching_args: DynamicBatching | None = None,
        sequence_packing_args: SequencePacking | None = None,
        rows_per_group: int = 1,
    ) -> list[SlicedDataDict] | tuple[list[SlicedDataDict], list[int]]: ...

    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        dynamic_batching_args: DynamicBatching | None = None,
        sequence_packing_args: SequencePacking | None = None,
        rows_per_group: int = 1,
    ) -> list[SlicedDataDict] | tuple[list[SlicedDataDict], list[int]]:
        """Distribute the rows of each global batch over `shards` workers.

        Rows are split into global batches of `batch_size` (default: all rows). Shard i gets the i-th part of each, so
        `shard.get_batch(k, batch_size // shards)` is its part of global batch k. With one global batch, tensors are
        views.

        Args:
            shards: number of shards.
            batch_size: rows per global batch over all shards.
            allow_uneven_shards: allow the first shards to have one more row; only for one global batch without a plan.
            dynamic_batching_args: form padded micro-batches with a bounded number of tokens.
            sequence_packing_args: pack rows into bins with a bounded number of tokens.
            rows_per_group: so many successive rows belong together: they get into one shard and, with dynamic batching
                or packing, into one micro-batch, next to each other and in order.

        Returns:
            The shards; with dynamic batching or packing `(shards, order)`, where `order[i]` is the row of this batch
            that is row i of the concatenated shards. `BatchedDataDict.from_batches(results).reorder_data(order)`
            restores this batch's order.

        Raises:
            ValueError: sizes are not divisible, options conflict, or a row exceeds the token bound.
        """
        size = self.size
        if dynamic_batching_args is not None and sequence_packing_args is not None:
            raise ValueError("Give dynamic_batching_args or sequence_packing_args, not both.")
        args: DynamicBatchingArgs | SequencePackingArgs | None = None
        if dynamic_batching_args is not None:
            args = parse_args(DynamicBatchingArgs, dynamic_batching_args)
        elif sequence_packing_args is not None:
            args = parse_args(SequencePackingArgs, sequence_packing_args)
        if allow_uneven_shards:
            if batch_size is not None or args is not None or rows_per_group != 1:
                raise ValueError(
                    "allow_uneven_shards excludes batch_size, dynamic batching, sequence packing and rows_per_group."
                )
            divided(0, "rows", shards, "shards")
            bounds = [shard * (size // shards) + min(shard, size % shards) for shard in range(shards + 1)]
            return [self.slice(start, end) for start, end in itertools.pairwise(bounds)]
        if batch_size is None:
            batch_size = size
        num_batches = divided(size, "rows", batch_size, "rows per global batch (batch_size)") if size else 1
        per_shard = divided(batch_size, "rows per global batch", shards, "shards")
        divided(per_shard, "rows per global batch of a shard", rows_per_group, "rows per group (rows_per_group)")
        if args is None:
            return self._sharded_evenly(shards, num_batches)
        return self._sharded_by_plan(shards, num_batches, args, rows_per_group)

    def reorder_data(self, order: Sequence[int] | torch.Tensor) -> None:
        """Undo a reordering, in place: row i moves to position `order[i]`.

        Args:
            order: a permutation of `range(size)`, as `shard_by_batch_size` returns it.
        """
        targets = [int(target) for target in order]
        size = self.size
        if sorted(targets) != list(range(size)):
            raise ValueError(f"order must be a permutation of the {size} rows, got {len(targets)} entries.")
        inverse = [0] * size
        for row, target in enumerate(targets):
            inverse[target] = row
        self.update(self._rows(inverse))
        self.microbatch_plan = None

    # --- micro-batches ----------------------------------------------------------------------------------------------

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches in the plan, over all global batches that this shard holds."""
        return sum(len(batch) for batch in self._plan().batches)

    def make_microbatch_iterator(self, microbatch_size: int) -> Iterator[SlicedDataDict]:
        """Iterate over parts of `microbatch_size` rows, in order.

        Raises:
            ValueError: the number of rows is not divisible; raised by the call, not by the first iteration.
        """
        size = self.size
        if size:
            divided(size, "rows", microbatch_size, "rows per micro-batch (microbatch_size)")
        return (self.slice(start, start + microbatch_size) for start in range(0, size, microbatch_size))

    def make_microbatch_iterator_with_dynamic_shapes(self, sequence_dim: int = 1) -> Iterator[SlicedDataDict]:
        """Iterate over the micro-batches of a shard made with `dynamic_batching_args`.

        Tensors whose size in `sequence_dim` equals the input's are cut to the micro-batch's padded length. Rows must be
        padded on the right.

        Raises:
            ValueError: the shard has no such plan; raised by the call, not by the first iteration.
        """
        plan = self._plan(packed=False)
        width = self[plan.input_key].shape[sequence_dim]

        def cut(microbatch: Microbatch, start: int) -> SlicedDataDict:
            part = self.slice(start + microbatch.start, start + microbatch.end)
            for key, value in part.items():
                if isinstance(value, torch.Tensor) and value.ndim > sequence_dim and value.shape[sequence_dim] == width:
                    part[key] = value.narrow(sequence_dim, 0, min(microbatch.length, width))
            return part

        return (cut(microbatch, start) for microbatch, start in _placed(plan))

    def make_microbatch_iterator_for_packable_sequences(self) -> Iterator[SlicedDataDict]:
        """Iterate over the bins of a shard made with `sequence_packing_args`: the rows of each, not yet concatenated.

        Raises:
            ValueError: the shard has no such plan; raised by the call, not by the first iteration.
        """
        plan = self._plan(packed=True)
        return (self.slice(start + microbatch.start, start + microbatch.end) for microbatch, start in _placed(plan))

    def truncate_tensors(self, dim: int, truncated_len: int) -> None:
        """Truncate every tensor with a dimension `dim` (at least 1) to at most `truncated_len` in it, in place."""
        if dim < 1 or truncated_len < 0:
            raise ValueError(f"dim must be >= 1 and truncated_len >= 0, got dim={dim}, truncated_len={truncated_len}.")
        for key, value in self.items():
            if isinstance(value, torch.Tensor) and value.ndim > dim:
                self[key] = value.narrow(dim, 0, min(truncated_len, value.shape[dim]))

    # --- devices and pickling ---------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors to `device` in place and return this batch."""
        for key, value in self.items():
            if isinstance(value, torch.Tensor):
                self[key] = value.to(device)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unpickled, (type(self), {key: to_pickled(value) for key, value in self.items()}, self.microbatch_plan))

    # --- internals --------------------------------------------------------------------------------------------------

    def _rows(self, rows: Sequence[int]) -> dict[str, Any]:
        return {key: take(value, rows) for key, value in self.items()}

    def _plan(self, packed: bool | None = None) -> MicrobatchPlan:
        plan = self.microbatch_plan
        if plan is None or packed not in (None, plan.packed):
            need = {None: "a micro-batch plan", True: "sequence_packing_args", False: "dynamic_batching_args"}[packed]
            raise ValueError(f"This batch was not created by shard_by_batch_size with {need}.")
        return plan

    def _sharded_evenly(self, shards: int, num_batches: int) -> list[SlicedDataDict]:
        per_batch = self.size // num_batches
        per_shard = per_batch // shards

        def part(value: Any, shard: int) -> Any:
            if isinstance(value, torch.Tensor):
                rest = value.shape[1:]
                return value.reshape(num_batches, shards, per_shard, *rest)[:, shard].reshape(-1, *rest)
            starts = range(shard * per_shard, self.size, per_batch) if per_shard else ()
            return [item for start in starts for item in value[start : start + per_shard]]

        if num_batches == 1:
            return [self.slice(shard * per_shard, (shard + 1) * per_shard) for shard in range(shards)]
        return [SlicedDataDict({key: part(value, shard) for key, value in self.items()}) for shard in range(shards)]

    def _sharded_by_plan(
        self, shards: int, num_batches: int, args: DynamicBatchingArgs | SequencePackingArgs, rows_per_group: int
    ) -> tuple[list[SlicedDataDict], list[int]]:
        lengths = self._sequence_lengths(args.input_key, args.input_lengths_key)
        if not lengths:
            raise ValueError("An empty batch cannot be split into micro-batches.")
        per_batch = len(lengths) // num_batches
        offsets = range(0, len(lengths), per_batch)
        width = self[args.input_key].shape[1]
        plans = [
            plan_batches(lengths[offset : offset + per_batch], width, shards, args, rows_per_group)
            for offset in offsets
        ]
        packed = isinstance(args, SequencePackingArgs)
        parts: list[SlicedDataDict] = []
        order: list[int] = []
        for shard in range(shards):
            rows = [offset + row for offset, plan in zip(offsets, plans) for row in plan[shard][0]]
            part = SlicedDataDict(self._rows(rows))
            part.microbatch_plan = MicrobatchPlan(packed, args.input_key, tuple(plan[shard][1] for plan in plans))
            parts.append(part)
            order.extend(rows)
        return parts, order

    def _sequence_lengths(self, input_key: str, lengths_key: str) -> list[int]:
        for key in (input_key, lengths_key):
            if key not in self:
                raise ValueError(f"The batch has no key {key!r}, only {sorted(self)}.")
        value = self[lengths_key]
        lengths = [int(length) for length in (value.tolist() if isinstance(value, torch.Tensor) else value)]
        inputs = self[input_key]
        if not isinstance(inputs, torch.Tensor) or inputs.ndim < 2:
            raise ValueError(f"{input_key!r} must be a tensor [batch, sequence, ...].")
        width = inputs.shape[1]
        for row, length in enumerate(lengths):
            if not 0 <= length <= width:
                raise ValueError(
                    f"{lengths_key!r}[{row}] is {length}, but {input_key!r} has {width} tokens per row "
                    f"(shape {list(inputs.shape)})."
                )
        return lengths


class SlicedDataDict(BatchedDataDict):
    """Holds a part of a batch: a shard, a shard's rows of a global batch, or a micro-batch."""


def _placed(plan: MicrobatchPlan) -> Iterator[tuple[Microbatch, int]]:
    """Yield each micro-batch with the row of the shard at which its global batch starts."""
    start = 0
    for batch_idx, batch in enumerate(plan.batches):
        for microbatch in batch:
            yield microbatch, start
        start += plan.num_rows(batch_idx)


def _unpickled(kind: type[BatchedDataDict], values: dict[str, Any], plan: MicrobatchPlan | None) -> BatchedDataDict:
    batch = kind({key: from_pickled(value) for key, value in values.items()})
    batch.microbatch_plan = plan
    return batch
