"""The driver's handle of the workers of one environment, its replicas.

::

    submit(requests) ──► resets: the replica with the fewest episodes ──► at most `concurrency` calls per replica
                         steps:  the replica of the episode                      │
    collect() ◄── replies, and failures of calls that took too long ◄── one thread per replica waits for its replies,
                  or whose replica has ended                            and replaces the replica when it ends
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from nemo_rl.distributed.futures import WORKER_DEATHS
from nemo_rl.distributed.workers.host import ATTEST_METHOD
from nemo_rl.distributed.workers.startup import all_dead, kill_and_wait
from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.environments.registry import python_fields
from nemo_rl.environments.replica_nodes import ReplicaNodes
from nemo_rl.environments.replica_start import ReplicaStarter
from nemo_rl.errors import EnvironmentFailure

logger = logging.getLogger(__name__)

_POLL_S = 30.0  # a worker answers an empty poll after this time
_SHUTDOWN_S = 10.0
_NODE_LOSS_S = 60.0  # Ray declares a node lost sooner
_MAX_REASONS = 3


class EnvironmentGroup:
    """Runs the episodes of one environment in several workers. Thread-safe.

    The workers take no bundle of the job, and are distributed evenly over the nodes. The constructor returns at once:
    `wait_ready` waits for the workers, and calls that are submitted before they have started are queued.

    If the environment raises, the worker dies, or the call takes longer than `step_timeout_s`, the reply has a
    `failure`. A worker that has ended is replaced while the others continue. A repeated `reset` of an episode goes to
    another worker if there is one.

    Example:
        group = EnvironmentGroup("game", "my_package.games.Nim", {"stones": 7}, num_replicas=2)
        group.submit([Request(0, "reset", {"seed": 1})])
        [reply] = group.collect(timeout_s=60)
        group.shutdown()

    Args:
        name: Name of the environment in the section `env` of the configuration, for messages.
        fqn: `package.module.name` of the environment. See `EpisodeHost`.
        config: Its keyword arguments.
        py_executable: Python of the environment. Default: the registered one of `fqn`, or the driver's.
        runtime_env: Fields of Ray's `RuntimeEnv`. `pip` and `uv` add packages to the Python.
        own_process: Run the environment in a child process of each worker. Then its Python needs no ray and may have
            another version than the driver's.
        num_replicas: Number of workers.
        num_cpus, num_gpus, resources: What Ray reserves for each worker.
        concurrency: Most calls of a worker at a time.
        step_timeout_s: A call that takes longer fails. If all places of a worker are taken by such calls, the worker is
            replaced. None for no limit.
        memory_limit_mb: A worker that uses more memory, in MiB and with its child processes, is replaced. None for no
            limit.
        max_restarts: Most restarts of all workers together. Those because of `memory_limit_mb` or the loss of a node do
            not count.

    Raises:
        RuntimeEnvError: `runtime_env` is wrong.
    """

    def __init__(
        self,
        name: str,
        fqn: str,
        config: Mapping[str, Any],
        *,
        py_executable: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        own_process: bool = False,
        num_replicas: int = 1,
        num_cpus: float = 0.0,
        num_gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
        concurrency: int = 16,
        step_timeout_s: float | None = None,
        memory_limit_mb: int | None = None,
        max_restarts: int = 20,
    ) -> None:
        self.name = name
        self.fqn = fqn
        self._concurrency = concurrency
        self._step_timeout_s = step_timeout_s
        self._max_restarts = max_restarts
        self._nodes = ReplicaNodes()
        amounts = {"CPU": num_cpus, "GPU": num_gpus, **(resources or {})}
        self._starter = ReplicaStarter(
            name,
            fqn,
            dict(config),
            fields=python_fields(f"env.{name}", fqn, py_executable, runtime_env, own_process=own_process),
            own_process=own_process,
            resources={resource: amount for resource, amount in amounts.items() if amount > 0},
            concurrency=concurrency,
            memory_limit_mb=memory_limit_mb,
            nodes=self._nodes,
        )

        self._lock = threading.RLock()  # guards everything below
        self._numbers = itertools.count()
        self._episodes: dict[int, _Episode] = {}
        self._resets: deque[_Call] = deque()  # not assigned to a replica yet
        self._replicas: dict[int, _Replica] = {}  # those that run, by index
        self._restart_reasons: list[str] = []
        self._failure: EnvironmentFailure | None = None
        self._stopped = threading.Event()

        self._replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()  # None: `_failure` has been set
        self._ready: list[Future[None]] = [Future() for _ in range(num_replicas)]
        self._threads = [
            threading.Thread(target=self._run, args=(index,), name=f"env.{name} {index}", daemon=True)
            for index in range(num_replicas)
        ]
        for thread in self._threads:
            thread.start()

    # --- for the caller -----------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Wait until all workers have started. Raises what `RayWorkerBuilder` raises if one cannot be started."""
        for future in self._ready:
            future.result()

    def attestation(self) -> list[dict[str, Any]]:
        """Return a record per running worker: its process and venv, and as `child` its child process if it has one."""
        self.wait_ready()
        with self._lock:
            actors = [self._replicas[index].actor for index in sorted(self._replicas)]
        records: list[dict[str, Any]] = []
        for actor in actors:
            with contextlib.suppress(*WORKER_DEATHS):  # it is being replaced
                record, child = ray.get([getattr(actor, ATTEST_METHOD).remote(), actor.describe.remote()])
                records.append({**record, "child": child} if child else record)
        return records

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue calls. Those of one episode run one after another, in the order of their requests."""
        with self._lock:
            for request in requests:
                episode = self._episodes.setdefault(request.episode, _Episode(request.episode))
                episode.waiting.append(request)
                self._advance(episode)
            self._dispatch()

    def collect(self, timeout_s: float) -> list[Reply]:
        """Return the replies that are there; wait for the first one, at most `timeout_s` seconds.

        Raises:
            EnvironmentFailure: A worker cannot be started, or there were more than `max_restarts` restarts.
        """
        replies: list[Reply] = []
        if self._failure is not None:
            raise self._failure
        with contextlib.suppress(queue.Empty):
            reply = self._replies.get(timeout=timeout_s)
            while reply is not None:
                replies.append(reply)
                reply = self._replies.get_nowait()
        if self._failure is not None and not replies:
            raise self._failure
        return replies

    def shutdown(self) -> None:
        """Close all episodes and stop the workers. Idempotent; Ray is no longer used when this returns."""
        with self._lock:
            if not self._stopped.is_set():
                self._stopped.set()  # also stops a start
                actors = [replica.actor for replica in self._replicas.values()]
                closing: list[ray.ObjectRef] = [actor.shutdown.remote() for actor in actors]
                if closing:
                    ray.wait(closing, num_returns=len(closing), timeout=_SHUTDOWN_S)
                    kill_and_wait(actors)
        for thread in self._threads:
            thread.join()

    # --- episodes; the caller holds the lock --------------------------------------------------------------------------

    def _advance(self, episode: _Episode) -> None:
        """Queue the next calls of an episode until one runs or none is left."""
        while episode.waiting and not episode.is_open:
            request = episode.waiting.popleft()
            if request.method == "step":
                reason = episode.why_no_step()
                if reason is not None:
                    failure = f"{self.fqn}.step of env.{self.name} was not called: {reason}"
                    self._replies.put(Reply(episode.id, None, 0.0, failure))
                    continue
                assert episode.replica is not None
                assert episode.number is not None
                episode.is_open = True
                episode.replica.queue.append(_Call(episode, request, episode.number))
            else:
                self._release(episode)
                if request.method == "reset":
                    episode.is_open = True
                    episode.number = next(self._numbers)
                    self._resets.append(_Call(episode, request, episode.number))
                else:
                    episode.replica = None
        if not episode.is_open and episode.number is None and episode.replica is None:
            self._episodes.pop(episode.id, None)

    def _release(self, episode: _Episode) -> None:
        """Close the episode's object in its replica. The episode remembers the replica, to avoid it."""
        if episode.number is not None and episode.replica is not None and episode.replica.ended is None:
            episode.replica.num_episodes -= 1
            episode.replica.actor.submit.remote([Request(episode.number, "close")])
        episode.number = None

    def _dispatch(self) -> None:
        """Assign resets to replicas with free places, and send calls to the replicas."""
        blocked: list[_Call] = []
        while self._resets:
            free = [
                replica
                for replica in self._replicas.values()
                if len(replica.running) + len(replica.queue) < self._concurrency
            ]
            if not free:
                break
            call = self._resets.popleft()
            avoided = None if call.episode.replica is None else call.episode.replica.index
            if any(index != avoided for index in self._replicas):
                free = [replica for replica in free if replica.index != avoided]
            if not free:
                blocked.append(call)
                continue
            replica = min(free, key=lambda replica: replica.num_episodes + replica.num_stuck)
            call.episode.replica = replica
            replica.num_episodes += 1
            replica.queue.append(call)
        self._resets.extendleft(reversed(blocked))
        for replica in self._replicas.values():
            self._send(replica)

    def _send(self, replica: _Replica) -> None:
        requests = []
        while replica.queue and len(replica.running) < self._concurrency:
            call = replica.queue.popleft()
            call.started_at = time.monotonic()
            replica.running[call.number] = call
            requests.append(replace(call.request, episode=call.number))
        if requests:
            replica.actor.submit.remote(requests)

    def _finish(self, call: _Call, reply: Reply) -> None:
        self._replies.put(replace(reply, episode=call.episode.id))
        call.episode.is_open = False
        self._advance(call.episode)

    # --- replicas: each runs in a thread ------------------------------------------------------------------------------

    def _run(self, index: int) -> None:
        """Keep the replica `index` running until `shutdown`, or until it may not be restarted any more."""
        while True:
            try:
                actor = self._starter.start(index, self._stopped)
            except Exception as error:
                is_lost = self._nodes.is_lost(index)
                if not self._ready[index].done() and not is_lost:
                    self._ready[index].set_exception(error)
                    self._fail(f"env.{self.name} cannot be started: {error}", error)
                    return
                reason, is_counted = f"it cannot be started: {error}", not is_lost
            else:
                replica = _Replica(index, actor)
                with self._lock:
                    if self._stopped.is_set():
                        kill_and_wait([actor])
                    else:
                        self._replicas[index] = replica
                        self._dispatch()
                if not self._ready[index].done():
                    self._ready[index].set_result(None)
                ending = self._serve(replica)
                self._end(replica, ending.reason)
                if ending.has_died:
                    self._await_death(actor)
                kill_and_wait([actor])
                reason, is_counted = ending.reason, ending.is_counted and not self._nodes.is_lost(index)
            if self._stopped.is_set() or not self._may_restart(index, reason, is_counted):
                return

    def _await_death(self, actor: ActorHandle) -> None:
        """Wait until Ray has found out whether a worker or its node has died, so that a lost node gets no replacement.

        This takes some seconds, in which the node does not answer.
        """
        deadline = time.monotonic() + _NODE_LOSS_S
        while not all_dead([actor], timeout_s=1.0) and not self._stopped.is_set() and time.monotonic() < deadline:
            pass

    def _serve(self, replica: _Replica) -> _Ending:
        """Receive the replies of a replica until it ends."""
        poll: ray.ObjectRef | None = None
        while not self._stopped.is_set():
            timeout_s = self._expire(replica)
            if replica.num_stuck >= self._concurrency:
                return _Ending(f"all of its {self._concurrency} calls took longer than step_timeout_s")
            if poll is None:
                poll = replica.actor.collect.remote(_POLL_S)
            # A process that is frozen does not answer, but its calls must time out.
            ready, _ = ray.wait([poll], timeout=timeout_s)
            if not ready:
                continue
            try:
                replies = ray.get(poll)
            except RayTaskError as error:
                cause = error.cause
                is_expected = isinstance(cause, EnvironmentFailure | MemoryError)
                return _Ending(str(cause) if is_expected else repr(cause), not isinstance(cause, MemoryError))
            except RayError as error:
                return _Ending(_sentence(error), has_died=True)
            poll = None
            with self._lock:
                for reply in replies:
                    call = replica.running.pop(reply.episode, None)
                    if call is None:
                        logger.warning("%s", reply.failure)  # of `close`, which has no other reply
                    elif call.is_late:
                        replica.num_stuck -= 1
                    else:
                        self._finish(call, reply)
                self._dispatch()
        return _Ending("it was shut down", is_counted=False)

    def _expire(self, replica: _Replica) -> float:
        """Fail the calls that have taken too long. Returns after how many seconds to call this again."""
        limit_s = self._step_timeout_s
        if limit_s is None:
            return _POLL_S
        now = time.monotonic()
        next_s = limit_s
        with self._lock:
            for call in list(replica.running.values()):
                if call.is_late:
                    continue
                left_s = call.started_at + limit_s - now
                if left_s > 0:
                    next_s = min(next_s, left_s)
                    continue
                call.is_late = True
                replica.num_stuck += 1
                method = call.request.method
                failure = f"{self.fqn}.{method} took longer than env.{self.name}.step_timeout_s={limit_s:g}"
                self._release(call.episode)
                self._finish(call, Reply(call.episode.id, None, now - call.started_at, failure))
            self._dispatch()
        return next_s

    def _end(self, replica: _Replica, reason: str) -> None:
        """Fail the calls of a replica that has ended."""
        with self._lock:
            replica.ended = reason
            self._replicas.pop(replica.index, None)
            calls = [*(call for call in replica.running.values() if not call.is_late), *replica.queue]
            replica.running.clear()
            replica.queue.clear()
            for call in calls:
                seconds = time.monotonic() - call.started_at if call.started_at else 0.0
                failure = f"the worker of {self.fqn}.{call.request.method} has ended: {reason}"
                self._finish(call, Reply(call.episode.id, None, seconds, failure))
            self._dispatch()

    def _may_restart(self, index: int, reason: str, is_counted: bool) -> bool:
        logger.warning("worker %d of env.%s is restarted: %s", index, self.name, reason)
        with self._lock:
            if is_counted:
                self._restart_reasons.append(reason)
            count = len(self._restart_reasons)
            if count <= self._max_restarts:
                return True
            reasons = list(dict.fromkeys(self._restart_reasons))[-_MAX_REASONS:]
        self._fail(
            f"workers of env.{self.name} have ended {count} times, and env.{self.name}.max_restarts is "
            f"{self._max_restarts}: {'; '.join(reasons)}"
        )
        return False

    def _fail(self, message: str, cause: BaseException | None = None) -> None:
        failure = EnvironmentFailure(message)
        failure.__cause__ = cause
        with self._lock:
            self._failure = self._failure or failure
        self._replies.put(None)


@dataclass(eq=False)
class _Episode:
    """An episode of the caller.

    Attributes:
        id: The caller's number.
        number: Its number in the replica, new for each reset, so that late replies are recognized; None if it has no
            object there.
        replica: Where it runs, or ran last.
        waiting: Requests behind the one that is open.
        is_open: Whether a call is queued or runs.
    """

    id: int
    number: int | None = None
    replica: _Replica | None = None
    waiting: deque[Request] = field(default_factory=deque)
    is_open: bool = False

    def why_no_step(self) -> str | None:
        """Return why the episode has no object that could take a step; None if it has one."""
        if self.replica is None:
            return "there was no reset"
        if self.replica.ended is not None:
            return f"the worker of the episode has ended: {self.replica.ended}"
        return "an earlier call took too long" if self.number is None else None


@dataclass(eq=False)
class _Call:
    """A request of an episode, with the episode's number in the replica.

    Attributes:
        started_at: When it was sent; 0 before.
        is_late: Whether it has timed out.
    """

    episode: _Episode
    request: Request
    number: int
    started_at: float = 0.0
    is_late: bool = False


@dataclass(eq=False)
class _Replica:
    """A worker that runs, or has ended.

    Attributes:
        index: Its position in the group. Its replacement has the same.
        queue: Calls that wait for a free place.
        running: Calls that the worker has received, by the number of the episode.
        num_episodes: Episodes whose objects are in the worker.
        num_stuck: Calls in `running` that have timed out.
        ended: Why it has ended.
    """

    index: int
    actor: ActorHandle
    queue: deque[_Call] = field(default_factory=deque)
    running: dict[int, _Call] = field(default_factory=dict)
    num_episodes: int = 0
    num_stuck: int = 0
    ended: str | None = None


@dataclass(frozen=True)
class _Ending:
    """How a replica has ended.

    Attributes:
        reason: Why.
        is_counted: Whether its restart counts.
        has_died: Whether its process or its node does not answer any more.
    """

    reason: str
    is_counted: bool = True
    has_died: bool = False


def _sentence(error: RayError) -> str:
    """Return the text of Ray's error in one line, without its table of ids and its list of common causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return " ".join(lines).partition(" Some common causes include")[0] or repr(error)
