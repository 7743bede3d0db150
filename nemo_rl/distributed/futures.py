"""Results that are still on their way from several workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from nemo_rl.errors import WorkerError

# What a call raises whose worker is gone: Ray tells a process that was killed for lack of memory apart.
WORKER_DEATHS = (RayActorError, OutOfMemoryError)

# What a remote call returns: one reference, or a generator of references for a streaming method.
Reference: TypeAlias = "ray.ObjectRef | ray.ObjectRefGenerator"


class TiedWorkers(Protocol):
    """What a future asks of the worker group that was called."""

    label: str

    def tied_group_of(self, rank: int) -> int:
        """The index of the tied group that a rank belongs to."""
        ...

    def rank_of_actor(self, actor_id: str | None) -> int | None:
        """The rank of the actor with this id (hex); None for one that is not of this group."""
        ...

    def describe_worker(self, rank: int) -> str:
        """A worker's rank, name and node, for messages."""
        ...


@dataclass(frozen=True)
class MultiWorkerFuture:
    """One call that went to several workers.

    Attributes:
        futures: what the called workers return, in rank order of `called_workers`.
        called_workers: the global ranks that were called, ascending (dummy calls included).
        return_from_workers: the ranks among them whose result is kept; None means all.
    """

    futures: list[Reference]
    called_workers: list[int]
    return_from_workers: list[int] | None = None

    def __post_init__(self) -> None:
        if len(self.futures) != len(self.called_workers):
            raise ValueError(f"{len(self.futures)} futures for {len(self.called_workers)} called workers")
        unknown = set(self.return_from_workers or ()) - set(self.called_workers)
        if unknown:
            raise ValueError(f"results are wanted from ranks {sorted(unknown)}, which were not called")

    def get_results(self, worker_group: TiedWorkers, return_generators_as_proxies: bool = False) -> list[Any]:
        """The results, one per tied group, in rank order. See `RayWorkerGroup.get_all_worker_results`."""
        kept = self._kept(worker_group)
        # Also wait for the workers whose result is dropped: their failure is a failure of the call.
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
    """Wait for all `futures`; fail as soon as one fails.

    A streaming generator becomes the list of what it yields, or itself with `generators_as_proxies`.

    Raises:
        WorkerError: a worker died; names its rank and node, and chains Ray's own error.
        Exception: whatever the worker's method raised, unchanged.
    """
    plain = [future for future in futures if not isinstance(future, ray.ObjectRefGenerator)]
    try:
        values: Iterator[Any] = iter(ray.get(plain))
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


def worker_error(worker_group: TiedWorkers, error: RayError, ranks: Sequence[int]) -> WorkerError:
    """The `WorkerError` for one of `WORKER_DEATHS` of one of the called workers."""
    rank = worker_group.rank_of_actor(getattr(error, "actor_id", None))
    if rank is None and len(ranks) == 1:
        rank = ranks[0]
    if rank is None:
        return WorkerError(f"one of the workers {list(ranks)} of {worker_group.label} died: {error}")
    return WorkerError(f"worker {worker_group.describe_worker(rank)} died during a call: {error}")
