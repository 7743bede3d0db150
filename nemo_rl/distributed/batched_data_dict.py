"""A batch as a dict of tensors and lists, and the ways to cut it up for workers and put it together again.

A batch travels through Ray by its bytes: tensors on the CPU are pickled out of band, a view takes only its own bytes
(torch pickles the whole storage behind a view), and what a worker receives is its own and may be changed in place.
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
    header,
    join,
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
    """A dict whose values are tensors (batch first) or lists, all of the same batch size.

    Values are checked when the batch is used, not when they are put in: `ValueError` names key and sizes.

    Attributes:
        microbatch_plan: the micro-batches of a shard made with dynamic batching or sequence packing, else None.
    """

    microbatch_plan: MicrobatchPlan | None = None

    # ---- reading

    @property
    def size(self) -> int:
        """Number of rows; 0 for a batch without keys. Raises `ValueError` when keys disagree."""
        sizes = {key: num_rows(key, value) for key, value in self.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"All values of a batch must have the same number of rows, got {sizes}.")
        return next(iter(sizes.values()), 0)

    def get_dict(self) -> dict[str, Any]:
        """The same keys and values as a plain dict."""
        return dict(self)

    def copy(self) -> Self:
        """A batch of the same kind that shares the values."""
        new = type(self)(self)
        new.microbatch_plan = self.microbatch_plan
        return new

    __copy__ = copy

    def slice(self, start: int, end: int) -> SlicedDataDict:
        """Rows `start:end`; tensors are views. Raises `IndexError` unless `0 <= start <= end <= size`."""
        if not 0 <= start <= end <= self.size:
            raise IndexError(f"Rows {start}:{end} are out of range for a batch of {self.size} rows.")
        return SlicedDataDict({key: value[start:end] for key, value in self.items()})

    def select_indices(self, indices: Sequence[int] | torch.Tensor) -> Self:
        """The rows at `indices` (integers in any order, or a boolean mask `[size]`); tensors are copies."""
        return type(self)(self._taken(row_indices(indices, self.size)))

    def select_keys(self, *keys: str) -> Self:
        """A batch with only these keys; values are shared. Raises `ValueError` for a key that is not there."""
        missing = [key for key in keys if key not in self]
        if missing:
            raise ValueError(f"The batch has no keys {missing}, only {sorted(self)}.")
        return type(self)({key: self[key] for key in keys})

    def chunk(self, rank: int, chunks: int) -> SlicedDataDict:
        """The `rank`-th of `chunks` contiguous parts of equal size; tensors are views.

        Raises:
            ValueError: the rows do not divide by `chunks`.
            IndexError: `rank` is not in `0 <= rank < chunks`.
        """
        size = divided(self.size, "rows", chunks, "chunks")
        if not 0 <= rank < chunks:
            raise IndexError(f"Chunk {rank} is out of range for {chunks} chunks.")
        return self.slice(rank * size, (rank + 1) * size)

    def get_batch(self, batch_idx: int, batch_size: int | None = None) -> SlicedDataDict:
        """The rows that this (part of a) batch holds of global batch `batch_idx`, with their micro-batches.

        Args:
            batch_idx: which global batch.
            batch_size: rows per global batch *in this shard*; may be left out where a micro-batch plan knows.
        """
        plan = self.microbatch_plan
        if plan is None:
            if batch_size is None:
                raise ValueError("get_batch needs batch_size: this batch has no micro-batch plan.")
            return self.slice(batch_idx * batch_size, (batch_idx + 1) * batch_size)
        if not 0 <= batch_idx < len(plan.batches):
            raise IndexError(f"Global batch {batch_idx} is out of range: this shard holds {len(plan.batches)}.")
        start = sum(plan.num_rows(i) for i in range(batch_idx))
        part = self.slice(start, start + plan.num_rows(batch_idx))
        part.microbatch_plan = MicrobatchPlan(plan.packed, plan.input_key, (plan.batches[batch_idx],))
        return part

    # ---- putting together

    @classmethod
    def from_batches(cls, batches: Iterable[Mapping[str, Any]], pad_value_dict: PadValues | None = None) -> Self:
        """The rows of all batches, in order.

        Tensors that differ beyond the batch dimension are padded at the end of each dimension to the largest, with
        `pad_value_dict[key]`, or 0.

        Raises:
            ValueError: no batches, different keys, or values of one key that cannot be joined (a tensor and a list,
                different dtypes or numbers of dimensions); names the key and the sizes.
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
        """Each row `num_repeats` times in a row. List items are deep copies, so that repeats can grow apart."""
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
        """The rows of all ranks of `group` in rank order, on every rank. A collective: every rank must call it.

        Batch sizes and sequence lengths may differ between ranks; padding as in `from_batches`, whose `ValueError` is
        raised on every rank alike. Tensors must be where the group's backend can reach them (NCCL: on the GPU).
        """
        headers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(headers, {key: header(value) for key, value in self.items()}, group=group)
        # Ranks that disagree on what is a tensor must all fail here, before they wait for each other.
        kinds = [{key: "list" if of_key.shape is None else "tensor" for key, of_key in of.items()} for of in headers]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"all_gather needs the same keys and kinds of values on all ranks, got {kinds}.")
        ranks: list[dict[str, Any]] = [{} for _ in headers]
        # Rank 0's order of keys: all ranks must gather the tensors in the same order.
        for key, kind in kinds[0].items():
            of_ranks = [of[key] for of in headers]
            values = gather_tensor(self[key], of_ranks, group) if kind == "tensor" else [of.rows for of in of_ranks]
            for rank, value in enumerate(values):
                ranks[rank][key] = value
        return BatchedDataDict.from_batches(ranks, pad_value_dict)

    # ---- sharding

    @overload
    def shard_by_batch_size(
        self, shards: int, batch_size: int | None = None, allow_uneven_shards: bool = False
    ) -> list[SlicedDataDict]: ...
    @overload
    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        *,
        dynamic_batching_args: DynamicBatching,
    ) -> tuple[list[SlicedDataDict], list[int]]: ...
    @overload
    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        *,
        sequence_packing_args: SequencePacking,
    ) -> tuple[list[SlicedDataDict], list[int]]: ...
    @overload
    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        dynamic_batching_args: DynamicBatching | None = None,
        sequence_packing_args: SequencePacking | None = None,
    ) -> list[SlicedDataDict] | tuple[list[SlicedDataDict], list[int]]: ...

    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        dynamic_batching_args: DynamicBatching | None = None,
        sequence_packing_args: SequencePacking | None = None,
    ) -> list[SlicedDataDict] | tuple[list[SlicedDataDict], list[int]]:
        """Deal the rows of each global batch to `shards` workers.

        Rows are taken in global batches of `batch_size` (default: all rows); shard i gets the i-th part of each, so
        that `shard.get_batch(k, batch_size // shards)` is its part of global batch k. With one global batch, tensors
        are views.

        Args:
            shards: number of shards.
            batch_size: rows per global batch over all shards.
            allow_uneven_shards: the first shards may hold one row more; for one global batch without a plan.
            dynamic_batching_args: make padded micro-batches of a bounded number of tokens.
            sequence_packing_args: pack rows into bins of a bounded number of tokens.

        Returns:
            The shards; with dynamic batching or packing `(shards, order)`, where `order[i]` is the row of this batch
            that is row i of the shards laid end to end:
            `BatchedDataDict.from_batches(results).reorder_data(order)` brings results back into this batch's order.

        Raises:
            ValueError: sizes that do not divide, options that exclude each other, lengths that do not fit.
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
            if batch_size is not None or args is not None:
                raise ValueError("allow_uneven_shards excludes batch_size, dynamic batching and sequence packing.")
            divided(0, "rows", shards, "shards")
            bounds = [shard * (size // shards) + min(shard, size % shards) for shard in range(shards + 1)]
            return [self.slice(start, end) for start, end in itertools.pairwise(bounds)]
        if batch_size is None:
            batch_size = size
        num_batches = divided(size, "rows", batch_size, "rows per global batch (batch_size)") if size else 1
        divided(batch_size, "rows per global batch", shards, "shards")
        if args is None:
            return self._sharded_evenly(shards, num_batches)
        return self._sharded_by_plan(shards, num_batches, args)

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
        self.update(self._taken(inverse))
        self.microbatch_plan = None

    # ---- micro-batches

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches in the plan, over all global batches that this shard holds."""
        return sum(len(batch) for batch in self._plan().batches)

    def make_microbatch_iterator(self, microbatch_size: int) -> Iterator[SlicedDataDict]:
        """Parts of `microbatch_size` rows, in order. Raises `ValueError` at once when the rows do not divide."""
        size = self.size
        if size:
            divided(size, "rows", microbatch_size, "rows per micro-batch (microbatch_size)")
        return (self.slice(start, start + microbatch_size) for start in range(0, size, microbatch_size))

    def make_microbatch_iterator_with_dynamic_shapes(self, sequence_dim: int = 1) -> Iterator[SlicedDataDict]:
        """The micro-batches of a shard made with `dynamic_batching_args`.

        Tensors as wide as the input (in `sequence_dim`) are cut to the micro-batch's padded length; rows must be
        padded on the right. Raises `ValueError` at once when the shard was not made so.
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
        """The bins of a shard made with `sequence_packing_args`: the rows of each, still padded, to be laid end to end.

        Raises `ValueError` at once when the shard was not made so.
        """
        plan = self._plan(packed=True)
        return (self.slice(start + microbatch.start, start + microbatch.end) for microbatch, start in _placed(plan))

    def truncate_tensors(self, dim: int, truncated_len: int) -> None:
        """Cut every tensor that has dimension `dim` (at least 1) to at most `truncated_len` there, in place."""
        if dim < 1 or truncated_len < 0:
            raise ValueError(f"dim must be >= 1 and truncated_len >= 0, got dim={dim}, truncated_len={truncated_len}.")
        for key, value in self.items():
            if isinstance(value, torch.Tensor) and value.ndim > dim:
                self[key] = value.narrow(dim, 0, min(truncated_len, value.shape[dim]))

    # ---- moving

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors to `device`, in place, and return this batch."""
        for key, value in self.items():
            if isinstance(value, torch.Tensor):
                self[key] = value.to(device)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unpickled, (type(self), {key: to_pickled(value) for key, value in self.items()}, self.microbatch_plan))

    # ---- parts of the above

    def _taken(self, rows: Sequence[int]) -> dict[str, Any]:
        return {key: take(value, rows) for key, value in self.items()}

    def _plan(self, packed: bool | None = None) -> MicrobatchPlan:
        plan = self.microbatch_plan
        if plan is None or packed not in (None, plan.packed):
            need = {None: "a micro-batch plan", True: "sequence_packing_args", False: "dynamic_batching_args"}[packed]
            raise ValueError(f"This batch was not made by shard_by_batch_size with {need}.")
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
        self, shards: int, num_batches: int, args: DynamicBatchingArgs | SequencePackingArgs
    ) -> tuple[list[SlicedDataDict], list[int]]:
        lengths = self._sequence_lengths(args.input_key, args.input_lengths_key)
        if not lengths:
            raise ValueError("An empty batch cannot be cut into micro-batches.")
        per_batch = len(lengths) // num_batches
        offsets = range(0, len(lengths), per_batch)
        plans = [plan_batches(lengths[offset : offset + per_batch], shards, args) for offset in offsets]
        packed = isinstance(args, SequencePackingArgs)
        parts: list[SlicedDataDict] = []
        order: list[int] = []
        for shard in range(shards):
            rows = [offset + row for offset, plan in zip(offsets, plans) for row in plan[shard][0]]
            part = SlicedDataDict(self._taken(rows))
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
                    f"{lengths_key!r}[{row}] is {length}, but {input_key!r} holds {width} tokens per row "
                    f"(shape {list(inputs.shape)})."
                )
        return lengths


class SlicedDataDict(BatchedDataDict):
    """A part of a batch: a shard, a global batch's part of a shard, or a micro-batch."""


def _placed(plan: MicrobatchPlan) -> Iterator[tuple[Microbatch, int]]:
    """Each micro-batch with the shard's row at which its global batch starts."""
    start = 0
    for batch_idx, batch in enumerate(plan.batches):
        for microbatch in batch:
            yield microbatch, start
        start += plan.num_rows(batch_idx)


def _unpickled(kind: type[BatchedDataDict], values: dict[str, Any], plan: MicrobatchPlan | None) -> BatchedDataDict:
    batch = kind({key: from_pickled(value) for key, value in values.items()})
    batch.microbatch_plan = plan
    return batch
