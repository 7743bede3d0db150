"""Runs one stage after another, each on a pool of actors.

::

    groups of the last stage   ──▶ pending ──▶ the worker with the fewest calls ──▶ groups for the next
                                      ▲                      │ died
                                      └──── run again ◀──────┘  a replacement starts
    pending is empty ──▶ idle workers end, the next stage's workers start while the last calls run

A pool starts with one worker. It grows while the remaining work would take longer than starting another worker: a
process costs about a second of CPU time, more than a thousand small tasks.

A worker that ends is kept for the next run of the same stage in this session, if that is safe (see `worker_key` and
`StageWorker`). Such a worker holds no CPUs itself; the pool leases them from Ray, see `leases`.

The driver holds only references. Ray keeps the groups in shared memory and spills them to disk when that is full.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl import settings
from nemo_rl.distributed.futures import WORKER_DEATHS
from nemo_rl.distributed.kept_workers import STAGE_WORKERS
from nemo_rl.errors import PipelineError, StageError, StageStartError
from nemo_rl.pipelines.bootstrap import StageWorker
from nemo_rl.pipelines.executors.base import Cluster, PlannedStage, WorkersDied, set_aside_task, stage_error
from nemo_rl.pipelines.executors.leases import Lease, Leases
from nemo_rl.pipelines.items import Item, chunks, group_size

logger = logging.getLogger(__name__)

# Short calls are queued, so that the input of the next call is on the worker when a call ends. Nothing is queued behind
# a long call, because another worker may be free before it ends.
_CALLS_PER_WORKER = 2
_SHORT_CALL_S = 0.5
_PROCESS_START_S = 2.0  # approximate start of a Ray worker process, before the stage's own set-up
_NUM_RECENT_CALLS = 20
_POLL_S = 0.2
_LEASE_POLL_S = 0.01  # in the first moments of a request; Ray usually grants it in a few milliseconds
_LEASE_SOON_S = 1.0
_CLOSE_TIMEOUT_S = 30.0
_MAX_LOST_STARTS = 3  # in a row
_MAX_REASON_CHARS = 1000  # Ray's message includes the state of the entire node when memory is short

_StageActor: Any = ray.remote(StageWorker)  # once: Ray sends the class to the cluster for every call of `ray.remote`


@dataclass
class _Group:
    """Refers to tasks in the object store.

    Attributes:
        references: references to lists of items.
        num_tasks: number of tasks in all lists.
        num_deaths: number of workers that died while they ran the group.
    """

    references: list[ray.ObjectRef]
    num_tasks: int
    num_deaths: int = 0


@dataclass(eq=False)
class _Worker:
    """Tracks an actor. `calls` maps the completion of each call to its group and results generator, oldest first.

    `lease` holds the CPUs of a worker that may be kept. There is no actor yet while the lease waits for CPUs.
    `is_reused` is True while a process that ran the stage before is being set up again.
    """

    began: float
    lease: Lease | None = None
    handle: Any = None
    started: Any = None
    is_reused: bool = False
    is_ready: bool = False
    busy_since: float = 0.0
    calls: dict[ray.ObjectRef, tuple[_Group, Any]] = field(default_factory=dict)


class RayActorPoolExecutor:
    """Runs one stage after another, each on a pool of actors that share its tasks.

    Example::

        pipeline.run(RayActorPoolExecutor(max_workers_per_stage=8), run_dir="results/clean")

    Args:
        max_workers_per_stage: None allows as many workers as fit on the cluster. A stage's `num_workers` takes
            precedence.
        max_worker_deaths: how many workers may die on a task before the task is set aside.
    """

    stage_by_stage = True

    def __init__(self, *, max_workers_per_stage: int | None = None, max_worker_deaths: int = 2) -> None:
        self._max_workers = max_workers_per_stage
        self._max_deaths = max_worker_deaths

    def run(self, stages: Sequence[PlannedStage], items: Sequence[Item], cluster: Cluster) -> list[Item]:
        """See `Executor.run`."""
        size = group_size(len(items), cluster.num_cpus, stages[0].batch_size)
        groups = [_Group([ray.put(chunk)], len(chunk)) for chunk in chunks(items, size)]
        leases = Leases()
        pools = [_Pool(stage, cluster, leases, self._max_workers, self._max_deaths) for stage in stages]
        try:
            _start_early(pools, len(groups), cluster)
            for index, pool in enumerate(pools):
                groups = pool.run(groups, _LaterPools(pools[index + 1 :], cluster))
        finally:
            for pool in pools:
                pool.kill()
            leases.close_free()
        return [item for group in groups for item in _items(group, stages[-1].name)]


def gather(stage: PlannedStage, num_sources: int, cluster: Cluster) -> int:
    """Run a `GatherStage` on one worker. See `StageRunner.gather`; this is the same for all executors.

    Raises:
        PipelineError: the worker could not start.
        RayError: the stage failed, or its worker died.
    """
    leases = Leases()
    pool = _Pool(stage, cluster, leases, 1, 0)
    try:
        return pool.gather(num_sources, _LaterPools([], cluster))
    finally:
        pool.kill()
        leases.close_free()


def _results(generator: Any) -> list[_Group]:
    """Wait for a call and return its results. Raises the error that the call raised."""
    references: list[ray.ObjectRef] = list(generator)
    sizes = ray.get(references[-1])
    return [_Group([reference], size) for reference, size in zip(references[:-1], sizes)]


def _items(group: _Group, stage: str) -> list[Item]:
    """Fetch the tasks of a group. Raises `WorkersDied` if they were lost with their node."""
    try:
        return [item for reference in group.references for item in ray.get(reference)]
    except ObjectLostError as error:
        raise _lost_tasks(stage, error) from error


def _lost_tasks(stage: str, error: Exception) -> WorkersDied:
    return WorkersDied(PipelineError(f"tasks of stage {stage!r} were lost with their node: {error}"))


class _LaterPools:
    """Manages the pools of the stages that follow the running stage."""

    def __init__(self, pools: Sequence[_Pool], cluster: Cluster) -> None:
        self._pools = pools
        self._num_cpus = cluster.num_cpus

    def open(self, num_groups: int) -> None:
        """Start the first workers of the next stage."""
        if self._pools:
            self._pools[0].open(num_groups)

    def launch_granted(self) -> bool:
        """See `_Pool.launch_granted`."""
        waits = [not pool.launch_granted() for pool in self._pools]
        return not any(waits)

    def release_cpus(self, num_cpus: float) -> None:
        """Kill workers that were started early if the running stage, which holds `num_cpus`, needs their CPUs."""
        for pool in reversed(self._pools):
            if num_cpus + sum(other.num_cpus_held for other in self._pools) <= self._num_cpus:
                return
            pool.kill()


def _start_early(pools: Sequence[_Pool], num_groups: int, cluster: Cluster) -> None:
    """Start a worker of each later stage on the CPUs that the first stage leaves free, so that it is ready in time."""
    pools[0].open(num_groups)
    free_cpus = cluster.num_cpus - pools[0].num_workers * pools[0].stage.num_cpus
    for pool in pools[1:]:
        free_cpus -= pool.stage.num_cpus
        if free_cpus >= 0 and not pool.stage.num_gpus:
            pool.open(1)


class _Pool:
    """Manages the workers of one stage."""

    def __init__(
        self, stage: PlannedStage, cluster: Cluster, leases: Leases, limit: int | None, max_deaths: int
    ) -> None:
        self.stage = stage
        self._max_workers = stage.max_num_workers(cluster, limit)
        self._num_cpus = cluster.num_cpus
        self._max_deaths = max_deaths
        self._arguments = stage.constructor_arguments
        self._leases = leases
        self._key = stage.worker_key
        # Workers that may be kept. Further ones hold their CPUs themselves: each lease costs calls to Ray.
        self._max_leases = 0 if self._key is None else settings.KEEP_STAGE_WORKERS.get()
        self._options: dict[str, Any] = {"num_cpus": stage.num_cpus, "num_gpus": stage.num_gpus, "max_restarts": 0}
        if stage.runtime_env:
            self._options["runtime_env"] = stage.runtime_env
        self._workers: list[_Worker] = []
        self._start_s: float | None = None
        self._call_s: list[float] = []
        self._closing: dict[ray.ObjectRef, _Worker] = {}
        self._num_lost = 0

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    @property
    def num_cpus_held(self) -> float:
        return len(self._workers) * self.stage.num_cpus

    def open(self, num_groups: int) -> None:
        """Start the first workers for `num_groups` groups, without waiting for them."""
        self._start(min(num_groups, self._max_workers if self.stage.job.stage.num_workers is not None else 1))

    def _start(self, num_workers: int) -> None:
        while len(self._workers) < num_workers:
            worker = _Worker(time.monotonic())
            self._workers.append(worker)
            if sum(worker.lease is not None for worker in self._workers) < self._max_leases:
                worker.lease = self._leases.request(self.stage.num_cpus)
            else:
                self._launch_new(worker)

    def launch_granted(self) -> bool:
        """Start the workers whose leases have been granted. Returns whether none waits for a lease that is recent."""
        recent = time.monotonic() - _LEASE_SOON_S
        waits = False
        for worker in self._workers:
            if worker.handle is None and worker.lease is not None:
                if self._leases.is_granted(worker.lease):
                    self._launch(worker, worker.lease)
                else:
                    waits = waits or worker.began > recent
        return not waits

    def _launch(self, worker: _Worker, lease: Lease) -> None:
        """Set a kept worker up, or start a new one, on the node of the lease."""
        assert lease.node_id is not None
        handle: Any = STAGE_WORKERS.take(self._key, lease.node_id)
        if handle is None:
            self._launch_new(worker)
        else:
            worker.is_reused = True
            worker.handle, worker.started = handle, handle.restart.remote(self._arguments[0])

    def _launch_new(self, worker: _Worker) -> None:
        worker.is_reused = False
        handle: Any
        if worker.lease is None or worker.lease.node_id is None:
            handle = _StageActor.options(**self._options).remote(*self._arguments)
        else:
            on_node = NodeAffinitySchedulingStrategy(worker.lease.node_id, soft=False)
            num_threads = max(1, math.floor(self.stage.num_cpus))
            options = {**self._options, "num_cpus": 0, "scheduling_strategy": on_node}
            handle = _StageActor.options(**options).remote(*self._arguments, num_threads)
        worker.handle, worker.started = handle, handle.start.remote()

    def run(self, groups: list[_Group], following: _LaterPools) -> list[_Group]:
        """Run the stage over all groups. The next stage is opened once no group is pending."""
        pending = deque(self._sized(groups))
        done: list[_Group] = []
        opened = False
        while pending or any(worker.calls for worker in self._workers):
            num_left = len(pending) + sum(len(worker.calls) for worker in self._workers)
            self._start(min(num_left, self._max_workers, self._useful_workers(num_left)))
            self._hand_out(pending)
            if pending:
                following.release_cpus(self.num_cpus_held)
            else:
                if not opened:
                    following.open(len(done) + sum(len(worker.calls) for worker in self._workers))
                    opened = True
                self._end_idle()
            self._wait(pending, done, following)
        if not opened:
            following.open(len(done))
        self._end_idle()
        self._await_closed()
        return done

    def gather(self, num_sources: int, following: _LaterPools) -> int:
        """Run a `GatherStage` on one worker, and wait for it."""
        while not any(worker.is_ready for worker in self._workers):
            self._start(1)
            self._wait(deque(), [], following)
        number: int = ray.get(self._workers[0].handle.gather.remote(num_sources))
        self._end_idle()
        self._await_closed()
        return number

    def kill(self) -> None:
        """Kill all workers immediately."""
        for worker in [*self._workers, *self._closing.values()]:
            self._kill(worker)
        self._workers, self._closing = [], {}

    def _kill(self, worker: _Worker) -> None:
        if worker.handle is not None:
            ray.kill(worker.handle)
        if worker.lease is not None:
            self._leases.give_back(worker.lease)

    def _sized(self, groups: list[_Group]) -> list[_Group]:
        """Merge small groups, so that they hold whole batches and the number of calls stays small."""
        total = sum(group.num_tasks for group in groups)
        target = max(self.stage.batch_size, group_size(total, self._num_cpus, self.stage.batch_size) // 2)
        result: list[_Group] = []
        for group in groups:
            if result and result[-1].num_tasks + group.num_tasks <= target:
                result[-1].references += group.references
                result[-1].num_tasks += group.num_tasks
            elif group.num_tasks:
                result.append(_Group(list(group.references), group.num_tasks))
        return result

    def _useful_workers(self, num_groups: int) -> int:
        """Return the number of workers whose start pays off for `num_groups` groups."""
        if self.stage.job.stage.num_workers is not None:
            return self.stage.job.stage.num_workers
        if self._start_s is None:
            return 1
        now = time.monotonic()
        running = [now - worker.busy_since for worker in self._workers if worker.calls]
        mean_s = self._mean_call_s
        if mean_s is None:
            mean_s = max(running, default=0.0)
        return max(1, math.ceil(num_groups * mean_s / self._start_s))

    @property
    def _mean_call_s(self) -> float | None:
        """Mean duration of recent calls; None before the first call has ended."""
        recent = self._call_s[-_NUM_RECENT_CALLS:]
        return sum(recent) / len(recent) if recent else None

    def _hand_out(self, pending: deque[_Group]) -> None:
        ready = [worker for worker in self._workers if worker.is_ready]
        mean_s = self._mean_call_s
        most = 1 if mean_s is None or mean_s > _SHORT_CALL_S else _CALLS_PER_WORKER
        while pending and ready:
            worker = min(ready, key=lambda w: len(w.calls))
            if len(worker.calls) >= most:
                return
            group = pending.popleft()
            if not worker.calls:
                worker.busy_since = time.monotonic()
            generator: Any = worker.handle.run.options(num_returns="streaming").remote(*group.references)
            worker.calls[generator.completed()] = (group, generator)

    def _end_idle(self) -> None:
        for worker in [w for w in self._workers if not w.calls]:
            self._workers.remove(worker)
            if not worker.is_ready:
                self._kill(worker)
            elif worker.lease is None:
                self._closing[worker.handle.close.remote()] = worker
            else:
                self._closing[worker.handle.finish.remote()] = worker

    def _await_closed(self) -> None:
        if not self._closing:
            return
        finished, late = ray.wait(list(self._closing), num_returns=len(self._closing), timeout=_CLOSE_TIMEOUT_S)
        for reference in finished:
            self._finish_close(reference)
        if late:
            logger.warning(
                "%d workers of stage %r did not exit within %g s", len(late), self.stage.name, _CLOSE_TIMEOUT_S
            )
        for worker in self._closing.values():  # they end by themselves after the teardown
            if worker.lease is not None:
                self._leases.give_back(worker.lease)
        self._closing = {}

    def _finish_close(self, reference: ray.ObjectRef) -> None:
        worker = self._closing.pop(reference)
        may_be_kept = False
        try:
            may_be_kept = ray.get(reference) is True
        except RayActorError:
            pass  # the actor exits in close()
        except RayError as error:
            logger.warning("teardown of stage %r failed: %s", self.stage.name, error)
        if worker.lease is None:
            return
        if may_be_kept and worker.lease.node_id is not None:
            STAGE_WORKERS.keep(self._key, worker.lease.node_id, worker.handle)
            worker.handle = None
        self._kill(worker)

    def _wait(self, pending: deque[_Group], done: list[_Group], following: _LaterPools) -> None:
        are_granted = [self.launch_granted(), following.launch_granted()]
        self._leases.close_free()
        by_reference: dict[ray.ObjectRef, _Worker] = {}
        for worker in self._workers:
            if worker.started is not None:
                for reference in worker.calls if worker.is_ready else [worker.started]:
                    by_reference[reference] = worker
        timeout = _POLL_S if all(are_granted) else _LEASE_POLL_S
        references = [*by_reference, *self._closing]
        ready: list[ray.ObjectRef] = []
        if references:
            ready, _ = ray.wait(references, num_returns=1, timeout=timeout, fetch_local=False)
        else:
            time.sleep(timeout)
        if not ready:
            self._check_late()
        for reference in ready:
            if reference in self._closing:
                self._finish_close(reference)
            elif (worker := by_reference[reference]).is_ready:
                self._finish_call(worker, reference, pending, done)
            else:
                self._finish_start(worker)

    def _check_late(self) -> None:
        limit = settings.WORKER_START_TIMEOUT_S.get()
        if any(worker.is_ready for worker in self._workers):
            return  # the workers that are ready can do all the work
        late = [worker for worker in self._workers if time.monotonic() - worker.began > limit]
        if late:
            raise StageStartError(
                f"stage {self.stage.name!r}: no worker started within {limit:.0f} s. Other jobs may hold the CPUs or "
                f"GPUs that it needs (see `ray status`). {settings.WORKER_START_TIMEOUT_S.name} sets the limit.",
                stage=self.stage.name,
            )

    def _finish_start(self, worker: _Worker) -> None:
        try:
            in_process_s = ray.get(worker.started)
            if in_process_s is None:  # the kept process cannot be used again
                self._replace_kept(worker)
                return
            worker.is_ready = True
            self._num_lost = 0
            if self._start_s is None:  # a worker that was started early may have been ready for a while
                # Of a new worker; a kept one starts in much less time.
                took_s = time.monotonic() - worker.began
                expected_s = _PROCESS_START_S + in_process_s
                self._start_s = expected_s if worker.is_reused else min(took_s, expected_s)
        except RayError as error:
            if worker.is_reused:
                self._replace_kept(worker)
                return
            if isinstance(error, WORKER_DEATHS) and stage_error(error) is None and self._num_lost < _MAX_LOST_STARTS:
                self._num_lost += 1
                self._remove_dead(worker)  # its node may have died; Ray starts the next worker on another one
                return
            raise stage_error(error) or StageStartError(
                f"stage {self.stage.name!r}: a worker did not start: {error}", stage=self.stage.name
            ) from error

    def _replace_kept(self, worker: _Worker) -> None:
        """Start a new worker in place of a kept one that has died or must not be used."""
        ray.kill(worker.handle)
        self._launch_new(worker)

    def _remove_dead(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        if worker.lease is not None:
            self._leases.discard(worker.lease)

    def _finish_call(
        self, worker: _Worker, completed: ray.ObjectRef, pending: deque[_Group], done: list[_Group]
    ) -> None:
        try:
            results = _results(worker.calls[completed][1])
        except WORKER_DEATHS as error:
            self._replace(worker, completed, error, pending, done)
            return
        except RayError as error:
            if isinstance(error, ObjectLostError) or isinstance(getattr(error, "cause", None), ObjectLostError):
                raise _lost_tasks(self.stage.name, error) from error
            raise stage_error(error) or StageError(
                f"stage {self.stage.name!r} failed: {error}", stage=self.stage.name
            ) from error
        del worker.calls[completed]
        now = time.monotonic()
        self._call_s.append(now - worker.busy_since)
        worker.busy_since = now
        done += results

    def _replace(
        self,
        worker: _Worker,
        failed: ray.ObjectRef,
        error: RayError,
        pending: deque[_Group],
        done: list[_Group],
    ) -> None:
        """Run a dead worker's groups again. The worker died in the oldest call that it did not finish."""
        self._remove_dead(worker)
        groups: list[_Group] = []
        for completed, (group, generator) in worker.calls.items():
            try:
                if completed == failed:
                    raise error
                done += _results(generator)
            except RayError:
                groups.append(group)
        pending.extendleft(reversed(groups[1:]))
        first = groups[0]
        first.num_deaths += 1
        reason = shorten(str(error), _MAX_REASON_CHARS)
        logger.warning("a worker of stage %r died; its tasks run again: %s", self.stage.name, reason)
        if first.num_deaths <= self._max_deaths // 2:
            pending.appendleft(first)
            return
        items = _items(first, self.stage.name)
        if len(items) > 1:  # run them one by one to find the one that kills its worker
            pending.extendleft(_Group([ray.put([item])], 1, first.num_deaths) for item in reversed(items))
        elif first.num_deaths <= self._max_deaths:
            pending.appendleft(first)
        else:
            set_aside_task(
                self.stage, items[0], f"its worker died {first.num_deaths} times: {reason}", first.num_deaths
            )
