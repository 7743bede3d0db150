"""Calling the workers of a group: the same data, different data, or data laid out on named axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from nemo_rl.distributed.futures import MultiWorkerFuture, Reference, TiedWorkers, get_values
from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.worker_dispatch import (
    check_list_lengths,
    check_nested_lengths,
    pick,
    plan_sharded_call,
    ranks_called,
)
from nemo_rl.errors import WorkerError

# Values of these types are sent as they are: they are smaller than a reference to a shared copy.
_SMALL_TYPES = (type(None), bool, int, float)
_SMALL_TEXT = 256


class WorkerCalls(TiedWorkers):
    """The calls of a worker group, which sets the attributes and owns the workers.

    Attributes:
        label: what messages call the group.
        sharding_annotations: the ranks on named axes; None without any.
    """

    sharding_annotations: NamedSharding | None
    _fqn: str
    _methods: tuple[str, ...]
    _workers: list[ActorHandle]
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
        """Call `method(**kwargs)` on all workers, with the same data: each argument is put into the object store once.

        Args:
            run_rank_0_only_axes: axes of which only index 0 is called.

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
        """Call `method` on all workers, each with its own entry of every list.

        Args:
            run_rank_0_only_axes: axes of which only index 0 is called.
            common_kwargs: the same for all.
            **lists: one entry per called worker, in rank order.

        Raises:
            ValueError: a list whose length is not the number of called workers, or an argument given twice.
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
        """Call `method` with data that is laid out on the group's named axes.

        Args:
            in_sharded_axes: axes along which the data differs; every argument is nested lists in this order.
            replicate_on_axes: axes along which workers get the same object, put into the object store once.
            output_is_replicated: axes along which the results are equal: only index 0's are kept.
            make_dummy_calls_to_free_axes: also call the workers that are not at index 0 of the other (free) axes, with
                None for every nested argument; their results are dropped.
            common_kwargs: the same for all, dummy calls included.
            **nested_lists: whole objects when `in_sharded_axes` is empty.

        Raises:
            ValueError: an unknown axis, one both sharded and replicated, or data of another length than its axis.
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
        users_per_slice = len(call.called) // len(set(call.slice_of.values()))
        slices = {
            index: _shared({name: pick(data, index) for name, data in nested_lists.items()}, users_per_slice)
            for index in set(call.slice_of.values())
        }
        nothing = dict.fromkeys(nested_lists)
        futures = [
            getattr(self._workers[rank], method).remote(
                **common, **(slices[call.slice_of[rank]] if rank in call.slice_of else nothing)
            )
            for rank in ranks
        ]
        return MultiWorkerFuture(futures, ranks, call.returning)

    def get_all_worker_results(
        self, future: MultiWorkerFuture | Sequence[Reference], return_generators_as_proxies: bool = False
    ) -> list[Any]:
        """Wait for a call's results: one per tied group, in rank order. For plain references: one each, in their order.

        A streaming method's result is the list of what it yields, or the generator itself with
        `return_generators_as_proxies`.

        Raises:
            WorkerError: a worker died; names its rank and node, and chains Ray's own error.
            Exception: whatever the worker's method raised.
        """
        if isinstance(future, MultiWorkerFuture):
            return future.get_results(self, return_generators_as_proxies)
        return get_values(self, future, range(len(self._workers)), return_generators_as_proxies)

    def _check_method(self, method: str) -> None:
        if self._is_shut_down:
            raise WorkerError(f"{self.label} was shut down; it cannot run {method!r}")
        if method not in self._methods:
            raise AttributeError(f"{self._fqn} has no method {method!r}. Its methods: {', '.join(self._methods)}")


def _common(common_kwargs: Mapping[str, Any] | None, data: Mapping[str, Any]) -> dict[str, Any]:
    common = dict(common_kwargs or {})
    twice = sorted(common.keys() & data.keys())
    if twice:
        raise ValueError(f"{twice} are given both in common_kwargs and as data")
    return common


def _shared(kwargs: Mapping[str, Any], num_users: int) -> dict[str, Any]:
    """`kwargs` with every value that several workers will read put into the object store, once."""
    if num_users < 2:
        return dict(kwargs)
    return {name: value if _travels_as_is(value) else ray.put(value) for name, value in kwargs.items()}


def _travels_as_is(value: object) -> bool:
    if isinstance(value, str | bytes):
        return len(value) <= _SMALL_TEXT
    return isinstance(value, (*_SMALL_TYPES, ray.ObjectRef))
