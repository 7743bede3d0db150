"""Assigns the rows of a batch to shards and micro-batches, so that each micro-batch has a bounded number of tokens.

There are two methods. Both are pure functions of the sequence lengths, without torch and without randomness:

- *Dynamic batching* pads rows; a micro-batch costs `rows x longest row`. Rows are sorted by length to reduce padding.
  Every shard gets the same number of rows and the same micro-batch boundaries.
- *Sequence packing* concatenates rows; a micro-batch (a bin) costs the sum of its rows' lengths. Best-fit decreasing
  fills the bins (D. S. Johnson 1973: at most 11/9 of the optimal number of bins, plus a constant). Then the bins are
  distributed so that every shard gets the same number of bins and about the same number of tokens.

With both methods, all shards have the same number of micro-batches in each global batch, because ranks that reduce
gradients together must take the same number of steps. Rows can be in groups, such as the two answers of a preference
pair: then the planned items are groups, whose rows stay together and in order.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

# Names that NeMo RL gives to its packing algorithms.
_ALGORITHMS = ("concatenative", "first_fit_decreasing", "first_fit_shuffle", "modified_first_fit_decreasing")


@dataclass(frozen=True, kw_only=True)
class DynamicBatchingArgs:
    """Options of dynamic batching: padded micro-batches with a bounded number of tokens.

    Attributes:
        max_tokens_per_microbatch: upper bound of `rows x padded length` of a micro-batch.
        sequence_length_round: a micro-batch's padded length is rounded up to a multiple of this, but at most to the
            width of the tensor, which is not padded any further.
        input_key: key of the right-padded tensor `[batch, sequence]` that the lengths refer to.
        input_lengths_key: key of the lengths of the rows in tokens, `[batch]`.
    """

    max_tokens_per_microbatch: int
    sequence_length_round: int = 1
    input_key: str = "input_ids"
    input_lengths_key: str = "input_lengths"

    def __post_init__(self) -> None:
        _check_positive(self, "max_tokens_per_microbatch", "sequence_length_round")


@dataclass(frozen=True, kw_only=True)
class SequencePackingArgs:
    """Options of sequence packing: bins with a bounded number of tokens.

    Attributes:
        max_tokens_per_microbatch: upper bound of the sum of the lengths in a bin.
        sequence_length_pad_multiple: each row's length is rounded up to a multiple of this before it is packed.
        input_key: key of the right-padded tensor `[batch, sequence]` that the lengths refer to.
        input_lengths_key: key of the lengths of the rows in tokens, `[batch]`.
        algorithm: a packing algorithm of NeMo RL. Accepted for its callers; the bins are the same for each.
    """

    max_tokens_per_microbatch: int
    sequence_length_pad_multiple: int = 1
    input_key: str = "input_ids"
    input_lengths_key: str = "input_lengths"
    algorithm: str | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "max_tokens_per_microbatch", "sequence_length_pad_multiple")
        if self.algorithm is not None and self.algorithm.lower() not in _ALGORITHMS:
            raise ValueError(f"algorithm is {self.algorithm!r}; expected one of {', '.join(_ALGORITHMS)}, or None.")


@dataclass(frozen=True)
class Microbatch:
    """Rows `start:end` of one global batch of a shard.

    Attributes:
        start: first row, relative to the start of the global batch.
        end: one past the last row.
        length: tokens per row after padding (dynamic batching), or tokens of the bin (packing).
    """

    start: int
    end: int
    length: int


@dataclass(frozen=True)
class MicrobatchPlan:
    """The micro-batches of one shard.

    Attributes:
        packed: True for sequence packing, False for dynamic batching.
        input_key: key of the tensor that has the sequence dimension.
        batches: the micro-batches of each global batch, in row order.
    """

    packed: bool
    input_key: str
    batches: tuple[tuple[Microbatch, ...], ...]

    def num_rows(self, batch_idx: int) -> int:
        """Return the number of rows of global batch `batch_idx` in this shard."""
        return self.batches[batch_idx][-1].end


# The rows of a shard in their new order, as indices into the batch, and the micro-batches that they form.
ShardPlan = tuple[list[int], tuple[Microbatch, ...]]

ArgsT = TypeVar("ArgsT", DynamicBatchingArgs, SequencePackingArgs)


def parse_args(kind: type[ArgsT], args: ArgsT | Mapping[str, Any]) -> ArgsT:
    """Convert `args` to a `kind`. Raises `ValueError` for a mapping with unknown or missing keys."""
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
    lengths: Sequence[int],
    width: int,
    num_shards: int,
    args: DynamicBatchingArgs | SequencePackingArgs,
    rows_per_group: int = 1,
) -> list[ShardPlan]:
    """Plan groups of successive rows by `plan_dynamic_batches` or `plan_packed_batches`, by the type of `args`.

    A group has `rows_per_group` rows. Its rows are in one micro-batch, next to each other and in order. Arguments and
    errors are otherwise those of the two functions.
    """
    size = rows_per_group
    item = "Row" if size == 1 else f"Group of {size} rows"
    _check_divisible(len(lengths), size * num_shards)
    groups = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    bound = args.max_tokens_per_microbatch
    if isinstance(args, DynamicBatchingArgs):  # all rows of a micro-batch are padded to the longest
        padded = [min(_round_up(max(group), args.sequence_length_round), max(width, 1)) for group in groups]
        _check_bound([size * length for length in padded], bound, item)
        plans = plan_dynamic_batches(
            padded, width, num_shards, dataclasses.replace(args, max_tokens_per_microbatch=bound // size)
        )
    else:
        tokens = [sum(_round_up(row, args.sequence_length_pad_multiple) for row in group) for group in groups]
        _check_bound(tokens, bound, item)
        plans = plan_packed_batches(tokens, num_shards, dataclasses.replace(args, sequence_length_pad_multiple=1))
    return [
        (
            [size * group + row for group in order for row in range(size)],
            tuple(Microbatch(size * part.start, size * part.end, part.length) for part in microbatches),
        )
        for order, microbatches in plans
    ]


def plan_dynamic_batches(
    lengths: Sequence[int], width: int, num_shards: int, args: DynamicBatchingArgs
) -> list[ShardPlan]:
    """Distribute rows over shards and split the rows of each shard into padded micro-batches.

    Args:
        lengths: number of tokens of each row. The number of rows must be a multiple of `num_shards`.
        width: tokens per row of the padded tensor; no row of a micro-batch is longer.
        num_shards: number of shards.
        args: the bound and the rounding.

    Returns:
        One `ShardPlan` per shard. Boundaries and padded lengths are the same in all shards.

    Raises:
        ValueError: a single row exceeds the bound, or the number of rows is not divisible.
    """
    _check_divisible(len(lengths), num_shards)
    padded = [min(_round_up(length, args.sequence_length_round), max(width, 1)) for length in lengths]
    _check_bound(padded, args.max_tokens_per_microbatch)
    by_length = sorted(range(len(padded)), key=lambda row: (-padded[row], row))
    # groups[p] contains the rows at position p of all shards, the longest first.
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
    """Pack rows into bins and distribute the bins over shards, the same number to each.

    Arguments and errors are those of `plan_dynamic_batches`. A row's rounded length may exceed the width of the tensor,
    because packing copies the rows into a new one. Shards may have different numbers of rows.
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
        for bin_idx in _dealt(groups, shard):
            microbatches.append(Microbatch(len(rows), len(rows) + len(bins[bin_idx]), tokens[bin_idx]))
            rows.extend(bins[bin_idx])
        plans.append((rows, tuple(microbatches)))
    return plans


def pack(lengths: Sequence[int], capacity: int, bin_multiple: int = 1) -> list[list[int]]:
    """Pack items by best-fit decreasing, in O(n log n) comparisons.

    Args:
        lengths: size of each item, at least 1.
        capacity: largest sum of sizes in a bin.
        bin_multiple: the fullest bins are split until the number of bins is a multiple of this. The number of items
            must be a multiple too, so that no bin is empty.

    Returns:
        The bins, each a non-empty list of item indices.

    Raises:
        ValueError: a single item exceeds the capacity, or the number of items is not a multiple of `bin_multiple`.
    """
    _check_divisible(len(lengths), bin_multiple)
    _check_bound(lengths, capacity)
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free space, bin), sorted; the first with enough space fits best
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
    """Split a bin (longest item first) into two non-empty ones. Each item goes to the lighter one."""
    sides: tuple[list[int], list[int]] = ([], [])
    weights = [0, 0]
    for item in items:
        lighter = 0 if weights[0] <= weights[1] else 1
        sides[lighter].append(item)
        weights[lighter] += lengths[item]
    return sides


def _dealt(groups: list[list[int]], shard: int) -> list[int]:
    """Return the shard's element of each group. Every second group is reversed, which balances the shards' totals."""
    return [group[shard] if position % 2 == 0 else group[-1 - shard] for position, group in enumerate(groups)]


def _round_up(length: int, multiple: int) -> int:
    # An empty row takes one position, so that no micro-batch has width 0.
    return -(-max(length, 1) // multiple) * multiple


def _check_positive(args: object, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(args).__name__}.{name} must be a positive integer, got {value!r}.")


def _check_divisible(num_rows: int, num_shards: int) -> None:
    if num_rows % num_shards:
        raise ValueError(f"{num_rows} rows cannot be divided evenly among {num_shards} shards.")


def _check_bound(lengths: Sequence[int], bound: int, item: str = "Row") -> None:
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > bound:
        raise ValueError(
            f"{item} {longest} takes {lengths[longest]} tokens (after rounding up), more than "
            f"max_tokens_per_microbatch={bound}. Raise the bound or shorten the sequences."
        )
