"""Which rows of a batch go to which shard and micro-batch, so that micro-batches hold a bounded number of tokens.

Two ways, both pure functions of the sequences' lengths (no torch here, and no randomness):

- *dynamic batching*: rows are padded; a micro-batch costs `rows x longest row`. Rows are sorted by length, so that
  little is padding. Every shard gets the same number of rows and the same micro-batch boundaries.
- *sequence packing*: rows are laid end to end; a micro-batch (a bin) costs the sum of its rows' lengths. Best-fit
  decreasing fills the bins (D. S. Johnson 1973: at most 11/9 of the optimal number of bins, plus a constant), then
  bins are dealt so that every shard gets the same number of bins and about the same number of tokens.

In both, every shard has the same number of micro-batches in each global batch, as ranks that reduce gradients
together must run in step.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True, kw_only=True)
class DynamicBatchingArgs:
    """How to make padded micro-batches of a bounded number of tokens.

    Attributes:
        max_tokens_per_microbatch: bound of `rows x padded length` of one micro-batch.
        sequence_length_round: a micro-batch's padded length is rounded up to a multiple of this.
        input_key: key of the `[batch, sequence]` tensor that the lengths belong to (right-padded).
        input_lengths_key: key of the rows' lengths in tokens, `[batch]`.
    """

    max_tokens_per_microbatch: int
    sequence_length_round: int = 1
    input_key: str = "input_ids"
    input_lengths_key: str = "input_lengths"

    def __post_init__(self) -> None:
        _check_positive(self, "max_tokens_per_microbatch", "sequence_length_round")


@dataclass(frozen=True, kw_only=True)
class SequencePackingArgs:
    """How to pack rows into bins of a bounded number of tokens.

    Attributes:
        max_tokens_per_microbatch: bound of the sum of the lengths in one bin.
        sequence_length_pad_multiple: each row's length is rounded up to a multiple of this before it is packed.
        input_key: key of the `[batch, sequence]` tensor that the lengths belong to (right-padded).
        input_lengths_key: key of the rows' lengths in tokens, `[batch]`.
    """

    max_tokens_per_microbatch: int
    sequence_length_pad_multiple: int = 1
    input_key: str = "input_ids"
    input_lengths_key: str = "input_lengths"

    def __post_init__(self) -> None:
        _check_positive(self, "max_tokens_per_microbatch", "sequence_length_pad_multiple")


@dataclass(frozen=True)
class Microbatch:
    """Rows `start:end` of a shard's global batch.

    Attributes:
        start: first row, counted from the start of its global batch.
        end: one past the last row.
        length: tokens per row after padding (dynamic batching), or tokens in the whole bin (packing).
    """

    start: int
    end: int
    length: int


@dataclass(frozen=True)
class MicrobatchPlan:
    """The micro-batches of one shard.

    Attributes:
        packed: True for sequence packing, False for dynamic batching.
        input_key: key of the tensor whose width is the sequence dimension.
        batches: for each global batch, its micro-batches in row order.
    """

    packed: bool
    input_key: str
    batches: tuple[tuple[Microbatch, ...], ...]

    def num_rows(self, batch_idx: int) -> int:
        """Number of rows that this shard holds of global batch `batch_idx`."""
        return self.batches[batch_idx][-1].end


# A shard's rows in their new order, each as an index into the batch, and the micro-batches they form.
ShardPlan = tuple[list[int], tuple[Microbatch, ...]]

ArgsT = TypeVar("ArgsT", DynamicBatchingArgs, SequencePackingArgs)


def parse_args(kind: type[ArgsT], args: ArgsT | Mapping[str, Any]) -> ArgsT:
    """`args` as a `kind`. Raises `ValueError` for a mapping with unknown or missing keys."""
    if isinstance(args, kind):
        return args
    if not isinstance(args, Mapping):
        raise ValueError(f"Expected {kind.__name__} or a mapping with its fields, got {type(args).__name__}.")
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(args) - set(known))
    if unknown:
        raise ValueError(f"Unknown {kind.__name__} keys {unknown}; known: {known}.")
    if "max_tokens_per_microbatch" not in args:
        raise ValueError(f"{kind.__name__} needs max_tokens_per_microbatch; got {sorted(args)}.")
    return kind(**args)


def plan_batches(
    lengths: Sequence[int], num_shards: int, args: DynamicBatchingArgs | SequencePackingArgs
) -> list[ShardPlan]:
    """`plan_dynamic_batches` or `plan_packed_batches`, as the kind of `args` says."""
    if isinstance(args, DynamicBatchingArgs):
        return plan_dynamic_batches(lengths, num_shards, args)
    return plan_packed_batches(lengths, num_shards, args)


def plan_dynamic_batches(lengths: Sequence[int], num_shards: int, args: DynamicBatchingArgs) -> list[ShardPlan]:
    """Deal rows to shards and cut each shard's rows into padded micro-batches.

    Args:
        lengths: tokens of each row. Their number must be a multiple of `num_shards`.
        num_shards: number of shards.
        args: the bound and the rounding.

    Returns:
        One `ShardPlan` per shard. Boundaries and padded lengths are equal on all shards.

    Raises:
        ValueError: one row alone is over the bound, or the rows cannot be divided evenly.
    """
    _check_divisible(len(lengths), num_shards)
    padded = [_round_up(length, args.sequence_length_round) for length in lengths]
    _check_bound(padded, args.max_tokens_per_microbatch)
    by_length = sorted(range(len(padded)), key=lambda row: (-padded[row], row))
    # Group p holds the rows at position p of all shards, the longest of the group first.
    groups = [by_length[start : start + num_shards] for start in range(0, len(by_length), num_shards)]
    microbatches: list[Microbatch] = []
    start = 0
    while start < len(groups):
        length = padded[groups[start][0]]
        end = min(start + args.max_tokens_per_microbatch // length, len(groups))
        microbatches.append(Microbatch(start, end, length))
        start = end
    return [(_dealt(groups, shard), tuple(microbatches)) for shard in range(num_shards)]


def plan_packed_batches(lengths: Sequence[int], num_shards: int, args: SequencePackingArgs) -> list[ShardPlan]:
    """Pack rows into bins and deal the bins to shards, the same number to each.

    Args and errors as in `plan_dynamic_batches`; shards may hold different numbers of rows.
    """
    padded = [_round_up(length, args.sequence_length_pad_multiple) for length in lengths]
    bins = pack(padded, args.max_tokens_per_microbatch, bin_multiple=num_shards)
    tokens = [sum(padded[row] for row in rows) for rows in bins]
    by_tokens = sorted(range(len(bins)), key=lambda b: (-tokens[b], b))
    groups = [by_tokens[start : start + num_shards] for start in range(0, len(bins), num_shards)]
    plans: list[ShardPlan] = []
    for shard in range(num_shards):
        rows: list[int] = []
        microbatches: list[Microbatch] = []
        for chosen in _dealt(groups, shard):
            microbatches.append(Microbatch(len(rows), len(rows) + len(bins[chosen]), tokens[chosen]))
            rows.extend(bins[chosen])
        plans.append((rows, tuple(microbatches)))
    return plans


def pack(lengths: Sequence[int], capacity: int, bin_multiple: int = 1) -> list[list[int]]:
    """Best-fit decreasing bin packing, in O(n log n) comparisons.

    Args:
        lengths: size of each item, at least 1.
        capacity: largest sum of sizes in one bin.
        bin_multiple: the number of bins is made a multiple of this by halving the fullest bins. The number of items
            must be such a multiple too, so that no bin stays empty.

    Returns:
        The bins, each a list of item indices; none is empty.

    Raises:
        ValueError: one item alone is over the capacity, or the number of items is no such multiple.
    """
    _check_divisible(len(lengths), bin_multiple)
    _check_bound(lengths, capacity)
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted; the first with enough room fits best
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(rooms, (lengths[item], -1))
        if place == len(rooms):
            bins.append([item])
            bisect.insort(rooms, (capacity - lengths[item], len(bins) - 1))
        else:
            room, chosen = rooms.pop(place)
            bins[chosen].append(item)
            bisect.insort(rooms, (room - lengths[item], chosen))
    while len(bins) % bin_multiple:
        divisible = [b for b in range(len(bins)) if len(bins[b]) > 1]
        fullest = max(divisible, key=lambda b: (sum(lengths[i] for i in bins[b]), -b))
        bins[fullest], half = _halved(bins[fullest], lengths)
        bins.append(half)
    return bins


def _halved(items: list[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split a bin (longest item first) into two, neither empty: each item goes to the lighter side."""
    sides: tuple[list[int], list[int]] = ([], [])
    weights = [0, 0]
    for item in items:
        lighter = 0 if weights[0] <= weights[1] else 1
        sides[lighter].append(item)
        weights[lighter] += lengths[item]
    return sides


def _dealt(groups: list[list[int]], shard: int) -> list[int]:
    """The shard's element of each group; every second group is dealt backwards, which evens out the shards' totals."""
    return [group[shard] if position % 2 == 0 else group[-1 - shard] for position, group in enumerate(groups)]


def _round_up(length: int, multiple: int) -> int:
    # An empty row still takes one position, so that no micro-batch has width 0.
    return -(-max(length, 1) // multiple) * multiple


def _check_positive(args: object, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(args).__name__}.{name} must be a positive integer, got {value!r}.")


def _check_divisible(num_rows: int, num_shards: int) -> None:
    if num_rows % num_shards:
        raise ValueError(f"{num_rows} rows cannot be divided evenly among {num_shards} shards.")


def _check_bound(lengths: Sequence[int], bound: int) -> None:
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > bound:
        raise ValueError(
            f"Row {longest} takes {lengths[longest]} tokens (after rounding up), more than "
            f"max_tokens_per_microbatch={bound}. Raise the bound or shorten the sequences."
        )
