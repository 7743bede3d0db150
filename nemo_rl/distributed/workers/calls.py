"""Calls of the workers of a group: with the same data, with different data, or with data sharded over named axes.

`ranks_called`, `plan_sharded_call` and the length checks are pure functions over ranks and nested lists.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from nemo_rl.distributed.futures import MultiWorkerFuture, Reference, TiedWorkers, get_values
from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.workers.cancellation import cancel_calls
from nemo_rl.errors import WorkerError

logger = logging.getLogger(__name__)

# Values of these types are passed directly: they are smaller than a reference to a shared copy.
_SMALL_TYPES = (type(None), bool, int, float)
_MAX_SMALL_LENGTH = 256


class WorkerCalls(TiedWorkers):
    """Implements the calls of `RayWorkerGroup`, which sets the attributes and owns the workers.

    Attributes:
        label: the group's name in messages.
        sharding_annotations: the ranks on named axes; None for a group without axes.
    """

    sharding_annotations: NamedSharding | None
    _fqn: str
    _methods: tuple[str, ...]
    _workers: list[ActorHandle]
    _attestation: list[dict[str, Any]]
    _is_shut_down: bool

    def run_single_worker_single_data(self, method: str, worker_idx: int, **kwargs: Any) -> Reference:
        """Call `method(**kwargs)` on one worker."""
        self._check_method(method)
        if not 0 <= worker_idx < len(self._workers):
            raise IndexError(f"worker {worker_idx} does not exist: {self.label} has {len(self._workers)}")
        return getattr(self._workers[worker_idx], method).remote(**kwargs)

    def run_all_workers_single_data(
        self, method: str, *, run_rank_0_only_axes: list[str] | None = None, **kwargs: Any
    ) -> list[Reference]:
        """Call `method(**kwargs)` on all workers. Each argument is put into the object store once.

        Args:
            method: name of the workers' method.
            run_rank_0_only_axes: axes on which only index 0 is called.
            **kwargs: arguments of the method.

        Returns:
            One reference per called worker, in rank order.
        """
        self._check_method(method)
        ranks = ranks_called(self.sharding_annotations, len(self._workers), run_rank_0_only_axes)
        shared = _shared(kwargs, len(ranks))
        return [getattr(self._workers[rank], method).remote(**shared) for rank in ranks]

    def run_all_workers_multiple_data(
        self,
        method: str,
        *,
        run_rank_0_only_axes: list[str] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
        **lists: Sequence[Any],
    ) -> list[Reference]:
        """Call `method` on all workers, each with its entry of every list.

        Args:
            method: name of the workers' method.
            run_rank_0_only_axes: axes on which only index 0 is called.
            common_kwargs: arguments that are the same for all workers.
            **lists: one entry per called worker, in rank order.

        Returns:
            One reference per called worker, in rank order.

        Raises:
            ValueError: the length of a list is not the number of called workers, or an argument is given twice.
        """
        self._check_method(method)
        ranks = ranks_called(self.sharding_annotations, len(self._workers), run_rank_0_only_axes)
        check_list_lengths(lists, ranks)
        common = _shared(_common(common_kwargs, lists), len(ranks))
        return [
            getattr(self._workers[rank], method).remote(**common, **{name: data[i] for name, data in lists.items()})
            for i, rank in enumerate(ranks)
        ]

    def run_all_workers_sharded_data(
        self,
        method: str,
        *,
        in_sharded_axes: list[str] | None = None,
        replicate_on_axes: list[str] | None = None,
        output_is_replicated: list[str] | None = None,
        make_dummy_calls_to_free_axes: bool = False,
        common_kwargs: Mapping[str, Any] | None = None,
        **nested_lists: Any,
    ) -> MultiWorkerFuture:
        """Call `method` with data that is sharded over the group's named axes.

        Args:
            method: name of the workers' method.
            in_sharded_axes: axes along which the data differs. Every argument is nested lists in this order.
            replicate_on_axes: axes along which workers get the same object, which is put into the object store once.
            output_is_replicated: axes along which the results are equal; only those of index 0 are kept.
            make_dummy_calls_to_free_axes: also call the workers that are not at index 0 of the remaining (free) axes,
                with None for every nested argument. Their results are dropped.
            common_kwargs: arguments that are the same for all workers, dummy calls included.
            **nested_lists: the data; plain objects if `in_sharded_axes` is empty.

        Raises:
            ValueError: an axis is unknown, or both sharded and replicated, or the length of data is not that of its
                axis.
        """
        self._check_method(method)
        sharding = self.sharding_annotations
        if sharding is None:
            raise ValueError(f"{self.label} has no sharding_annotations; run_all_workers_sharded_data needs them")
        call = plan_sharded_call(
            sharding, in_sharded_axes, replicate_on_axes, output_is_replicated, make_dummy_calls_to_free_axes
        )
        for name, data in nested_lists.items():
            check_nested_lengths(name, data, in_sharded_axes or [], sharding)
        ranks = sorted([*call.called, *call.dummies])
        common = _shared(_common(common_kwargs, nested_lists), len(ranks))
        indices = set(call.slice_of.values())
        slices = {
            index: _shared(
                {name: pick(data, index) for name, data in nested_lists.items()}, len(call.called) // len(indices)
            )
            for index in indices
        }
        no_data = dict.fromkeys(nested_lists)
        futures = [
            getattr(self._workers[rank], method).remote(
                **common, **(slices[call.slice_of[rank]] if rank in call.slice_of else no_data)
            )
            for rank in ranks
        ]
        return MultiWorkerFuture(futures, ranks, call.returning)

    def get_all_worker_results(
        self, future: MultiWorkerFuture | Sequence[Reference], return_generators_as_proxies: bool = False
    ) -> list[Any]:
        """Wait for the results of a call: one per tied group, in rank order, or one per reference of a list.

        The result of a streaming method is the list of the values it yields, or the generator itself with
        `return_generators_as_proxies`. Ctrl-C cancels the calls of the group, see `cancel`.

        Raises:
            WorkerError: a worker died; names its rank and node, and chains Ray's error.
            CallCancelledError: the call was cancelled.
            Exception: the exception that the worker's method raised.
        """
        try:
            if isinstance(future, MultiWorkerFuture):
                return future.get_results(self, return_generators_as_proxies)
            return get_values(self, future, range(len(self._workers)), return_generators_as_proxies)
        except KeyboardInterrupt:
            self.cancel()
            raise

    def cancel(self, timeout: float = 10.0) -> bool:
        """Cancel the calls that run or wait on the workers. The workers keep their state and take new calls.

        A running method is interrupted as by Ctrl-C: a `KeyboardInterrupt` is raised in it, a coroutine is cancelled.
        Code that Python cannot interrupt ends first, such as a long call of a C library, and so do methods of a class
        with `max_concurrency` that are not coroutines. `get_all_worker_results` of a cancelled call raises
        `CallCancelledError`.

        Args:
            timeout: seconds to wait until the workers are idle.

        Returns:
            Whether all workers are idle.
        """
        if self._is_shut_down or not ray.is_initialized():
            return True
        busy = cancel_calls(self._workers, self._attestation, timeout)
        if busy:
            logger.warning(
                "%s: the calls of %d of %d workers could not be interrupted in %.0f s; `shutdown(force=True)` ends the "
                "workers",
                self.label,
                len(busy),
                len(self._workers),
                timeout,
            )
        return not busy

    def _check_method(self, method: str) -> None:
        if self._is_shut_down:
            raise WorkerError(f"{self.label} was shut down; it cannot run {method!r}")
        if method not in self._methods:
            raise AttributeError(f"{self._fqn} has no method {method!r}. Its methods: {', '.join(self._methods)}")


def _common(common_kwargs: Mapping[str, Any] | None, data: Mapping[str, Any]) -> dict[str, Any]:
    common = dict(common_kwargs or {})
    duplicates = sorted(common.keys() & data.keys())
    if duplicates:
        raise ValueError(f"{duplicates} are given both in common_kwargs and as data")
    return common


def _shared(kwargs: Mapping[str, Any], num_users: int) -> dict[str, Any]:
    """Return `kwargs`, with each value that several workers read put into the object store once."""
    if num_users < 2:
        return dict(kwargs)
    return {name: value if _is_small(value) else ray.put(value) for name, value in kwargs.items()}


def _is_small(value: object) -> bool:
    if isinstance(value, str | bytes):
        return len(value) <= _MAX_SMALL_LENGTH
    return isinstance(value, (*_SMALL_TYPES, ray.ObjectRef))


# --- which worker gets which part of the data -------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardedCall:
    """The workers of a sharded call.

    Attributes:
        called: global ranks that get data, ascending.
        dummies: global ranks that are called with None in place of all sharded data, ascending.
        slice_of: rank -> index into the nested data, outermost first; the empty tuple selects all of the data.
        returning: ranks whose result is kept, ascending.
    """

    called: list[int]
    dummies: list[int]
    slice_of: dict[int, tuple[int, ...]]
    returning: list[int]


def ranks_called(sharding: NamedSharding | None, world_size: int, rank_0_only_axes: Sequence[str] | None) -> list[int]:
    """Return the ranks at index 0 of every axis in `rank_0_only_axes`, ascending; all ranks without such axes.

    Raises:
        ValueError: there is no sharding, or an axis is unknown.
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
    """Determine which workers are called, with which slice, and whose results are kept.

    Axes that are neither sharded nor replicated are free: only index 0 takes part.

    Raises:
        ValueError: an axis is unknown, repeated, or both sharded and replicated.
    """
    sharded = _axis_names("in_sharded_axes", in_sharded_axes)
    replicated = _axis_names("replicate_on_axes", replicate_on_axes)
    single_output = _axis_names("output_is_replicated", output_is_replicated)
    for name in [*sharded, *replicated, *single_output]:
        sharding.get_axis_index(name)  # rejects unknown names
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
        ValueError: a length differs; names the argument, the position and both numbers.
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
    """Return `data[i][j]...` for index `(i, j, ...)`."""
    for position in index:
        data = data[position]
    return data


def check_list_lengths(lists: Mapping[str, Any], ranks: Sequence[int]) -> None:
    """Check that every list has one entry per called worker.

    Raises:
        ValueError: a length differs; names the argument and both numbers.
    """
    for name, data in lists.items():
        if not isinstance(data, list | tuple):
            raise ValueError(f"{name} must be a list with one entry per called worker, not {type(data).__name__}")
        if len(data) != len(ranks):
            raise ValueError(f"{name} has {len(data)} entries, but {len(ranks)} workers are called")


def _axis_names(option: str, names: Sequence[str] | None) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"{option} must be a list of axis names, not the string {names!r}")
    result = list(names or ())
    if len(set(result)) != len(result):
        raise ValueError(f"{option}={result} contains an axis twice")
    return result
