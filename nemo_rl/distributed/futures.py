"""Pending results of calls that several workers execute."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError, TaskCancelledError

from nemo_rl.errors import CallCancelledError, WorkerError

# What a call raises if its worker has died. Ray has a separate error for a process killed for lack of memory.
WORKER_DEATHS = (RayActorError, OutOfMemoryError)

# The result of a remote call: a reference, or a generator of references for a streaming method.
Reference: TypeAlias = "ray.ObjectRef | ray.ObjectRefGenerator"

# A collective operation fails as soon as the process of a peer ends. Ray reports the death a little later.
_DEATH_REPORT_S = 10.0


class TiedWorkers(Protocol):
    """The interface of a worker group that its futures use."""

    label: str

    def tied_group_of(self, rank: int) -> int:
        """Return the index of the tied group that a rank belongs to."""
        ...

    def rank_of_actor(self, actor: str | None) -> int | None:
        """Return the rank of the actor with this id (hex), or None if it is not a worker of this group."""
        ...

    def describe_worker(self, rank: int) -> str:
        """Return a worker's rank, name, node and pid, for messages."""
        ...


@dataclass(frozen=True)
class MultiWorkerFuture:
    """Holds the pending results of one call of several workers.

    Attributes:
        futures: the references of the called workers, in the order of `called_workers`.
        called_workers: the global ranks that were called, ascending (dummy calls included).
        return_from_workers: the ranks whose result is kept; None for all.
    """

    futures: list[Reference]
    called_workers: list[int]
    return_from_workers: list[int] | None = None

    def __post_init__(self) -> None:
        if len(self.futures) != len(self.called_workers):
            raise ValueError(f"{len(self.futures)} futures for {len(self.called_workers)} called workers")
        unknown = set(self.return_from_workers or ()) - set(self.called_workers)
        if unknown:
            raise ValueError(f"return_from_workers contains the ranks {sorted(unknown)}, which were not called")

    def get_results(self, worker_group: TiedWorkers, return_generators_as_proxies: bool = False) -> list[Any]:
        """Wait for the results: one per tied group, in rank order. See `RayWorkerGroup.get_all_worker_results`."""
        kept = self._kept(worker_group)
        # Wait also for workers whose result is dropped, because their failure is a failure of the call.
        values = get_values(worker_group, self.futures, self.called_workers, return_generators_as_proxies)
        return [value for rank, value in zip(self.called_workers, values) if rank in kept]

    def _kept(self, worker_group: TiedWorkers) -> set[int]:
        wanted = self.called_workers if self.return_from_workers is None else self.return_from_workers
        first_of_tied_group: dict[int, int] = {}
        for rank in sorted(wanted):
            first_of_tied_group.setdefault(worker_group.tied_group_of(rank), rank)
        return set(first_of_tied_group.values())


def get_values(
    worker_group: TiedWorkers, futures: Sequence[Reference], ranks: Sequence[int], generators_as_proxies: bool
) -> list[Any]:
    """Wait for all `futures`; raise as soon as one fails (see `get_all`).

    The value of a streaming generator is the list of the values it yields, or with `generators_as_proxies` itself.

    Raises:
        WorkerError: a worker died; names its rank and node, and chains Ray's error.
        CallCancelledError: the call was cancelled.
        Exception: the exception that the worker's method raised, unchanged.
    """
    plain = [future for future in futures if not isinstance(future, ray.ObjectRefGenerator)]
    try:
        values: Iterator[Any] = iter(get_all(plain))
        results: list[Any] = []
        for future in futures:
            if not isinstance(future, ray.ObjectRefGenerator):
                results.append(next(values))
            elif generators_as_proxies:
                results.append(future)
            else:
                results.append([ray.get(item) for item in future])
        return results
    except WORKER_DEATHS as error:
        raise worker_error(worker_group, error, ranks) from error
    except TaskCancelledError as error:
        raise CallCancelledError(f"a call of {worker_group.label} was cancelled") from error


def get_all(references: Iterable[ray.ObjectRef]) -> list[Any]:
    """Wait for all `references` of one call; raise as soon as one fails.

    If the death of a worker made its peers fail, the death is raised, with a peer's error as its cause.
    """
    calls = list(references)
    try:
        values: list[Any] = ray.get(calls)
        return values
    except RayTaskError as error:
        death = death_among(calls)
        if death is None:
            raise
        raise death from error


def death_among(references: Iterable[Reference]) -> RayError | None:
    """Return one of `WORKER_DEATHS` if a worker that executes one of these calls has died.

    Waits at most 10 s for calls that have not ended yet. For a call whose error may be due to a dead peer.
    """
    calls = [item.completed() if isinstance(item, ray.ObjectRefGenerator) else item for item in references]
    deadline = time.monotonic() + _DEATH_REPORT_S
    while calls:
        remaining = max(0.0, deadline - time.monotonic())
        ended, calls = ray.wait(calls, num_returns=1, timeout=remaining, fetch_local=False)
        if not ended:
            break
        try:
            ray.get(ended)
        except WORKER_DEATHS as death:
            return death
        except RayError:
            continue
    return None


def worker_error(worker_group: TiedWorkers, error: RayError, ranks: Sequence[int]) -> WorkerError:
    """Return the `WorkerError` for a `WORKER_DEATHS` error of one of the called workers."""
    rank = worker_group.rank_of_actor(getattr(error, "actor_id", None))
    if rank is None and len(ranks) == 1:
        rank = ranks[0]
    if rank is None:
        return WorkerError(f"one of the workers {list(ranks)} of {worker_group.label} died: {error}")
    return WorkerError(f"worker {worker_group.describe_worker(rank)} died during a call: {error}")
