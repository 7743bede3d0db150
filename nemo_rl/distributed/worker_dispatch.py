"""Which worker gets which part of a call's data. Pure functions over ranks and nested lists; no Ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl.distributed.named_sharding import NamedSharding


@dataclass(frozen=True)
class ShardedCall:
    """Who takes part in a sharded call.

    Attributes:
        called: global ranks that get data, ascending.
        dummies: global ranks that are called with None in place of all sharded data, ascending.
        slice_of: rank -> index into the nested data, outermost first; the empty tuple means the whole of it.
        returning: ranks whose result is kept, ascending.
    """

    called: list[int]
    dummies: list[int]
    slice_of: dict[int, tuple[int, ...]]
    returning: list[int]


def ranks_called(sharding: NamedSharding | None, world_size: int, rank_0_only_axes: Sequence[str] | None) -> list[int]:
    """Ranks at index 0 of every axis in `rank_0_only_axes`, ascending; all ranks when none is given.

    Raises:
        ValueError: axes without a sharding, or an unknown axis.
    """
    axes = _axis_names("run_rank_0_only_axes", rank_0_only_axes)
    if not axes:
        return list(range(world_size))
    if sharding is None:
        raise ValueError(f"run_rank_0_only_axes={axes} needs a worker group with sharding_annotations")
    return sorted(sharding.get_ranks_by_coord(**dict.fromkeys(axes, 0)))


def plan_sharded_call(
    sharding: NamedSharding,
    in_sharded_axes: Sequence[str] | None,
    replicate_on_axes: Sequence[str] | None,
    output_is_replicated: Sequence[str] | None,
    make_dummy_calls_to_free_axes: bool,
) -> ShardedCall:
    """Who is called, with which slice, and whose result counts.

    Axes that are neither sharded nor replicated are free: only index 0 takes part.

    Raises:
        ValueError: an unknown or repeated axis, or one that is both sharded and replicated.
    """
    sharded = _axis_names("in_sharded_axes", in_sharded_axes)
    replicated = _axis_names("replicate_on_axes", replicate_on_axes)
    single_output = _axis_names("output_is_replicated", output_is_replicated)
    for name in [*sharded, *replicated, *single_output]:
        sharding.get_axis_index(name)  # refuses unknown names
    both = [name for name in sharded if name in replicated]
    if both:
        raise ValueError(f"the axes {both} are given as sharded and as replicated; data is one or the other")
    free = [name for name in sharding.names if name not in sharded and name not in replicated]

    call = ShardedCall(called=[], dummies=[], slice_of={}, returning=[])
    for rank in sorted(int(rank) for rank in sharding.layout.flat):
        coords = sharding.get_worker_coords(rank)
        if any(coords[name] for name in free):
            if make_dummy_calls_to_free_axes:
                call.dummies.append(rank)
            continue
        call.called.append(rank)
        call.slice_of[rank] = tuple(coords[name] for name in sharded)
        if not any(coords[name] for name in single_output):
            call.returning.append(rank)
    return call


def check_nested_lengths(
    name: str, data: Any, axes: Sequence[str], sharding: NamedSharding, path: tuple[int, ...] = ()
) -> None:
    """Check that `data` is nested lists whose lengths are the sizes of `axes`, outermost first.

    Raises:
        ValueError: naming the argument, the place, and both numbers.
    """
    if not axes:
        return
    size = sharding.get_axis_size(axes[0])
    where = f"{name}{''.join(f'[{index}]' for index in path)}"
    if not isinstance(data, list | tuple):
        raise ValueError(
            f"{where} must be a list with one entry per worker on axis {axes[0]!r}, not {type(data).__name__}"
        )
    if len(data) != size:
        raise ValueError(f"{where} has {len(data)} entries, but axis {axes[0]!r} has {size} workers")
    for index, entry in enumerate(data):
        check_nested_lengths(name, entry, axes[1:], sharding, (*path, index))


def pick(data: Any, index: tuple[int, ...]) -> Any:
    """`data[i][j]...` for index `(i, j, ...)`."""
    for position in index:
        data = data[position]
    return data


def check_list_lengths(lists: Mapping[str, Any], ranks: Sequence[int]) -> None:
    """Check that every list holds one entry per called worker.

    Raises:
        ValueError: naming the argument and both numbers.
    """
    for name, data in lists.items():
        if not isinstance(data, list | tuple):
            raise ValueError(f"{name} must be a list with one entry per called worker, not {type(data).__name__}")
        if len(data) != len(ranks):
            raise ValueError(f"{name} has {len(data)} entries, but {len(ranks)} workers are called")


def _axis_names(option: str, names: Sequence[str] | None) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"{option} must be a list of axis names, not the text {names!r}")
    result = list(names or ())
    if len(set(result)) != len(result):
        raise ValueError(f"{option}={result} names an axis twice")
    return result
