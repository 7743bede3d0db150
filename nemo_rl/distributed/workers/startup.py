"""Waits for workers to start, and ends them.

::

    all handles created ──▶ one attestation call each ──▶ all answers, the first failure, or the timeout
                                                              │
                     kill every worker of the group  ◀── failure, timeout or Ctrl-C; then raise
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from nemo_rl import settings
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.futures import WORKER_DEATHS
from nemo_rl.distributed.ray_private import current_node
from nemo_rl.distributed.workers import host as worker_host
from nemo_rl.distributed.workers.class_description import ClassDescription
from nemo_rl.errors import AttestationError, NodeLostError, WorkerStartError
from nemo_rl.secrets import mask_secrets
from nemo_rl.utils.names import abbreviated

_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.02
_LIVENESS_INTERVAL_S = 1.0
_LAST_LINES = 20


@dataclass(frozen=True)
class StartingWorker:
    """A worker whose actor has been created but may not be running yet.

    Attributes:
        handle: the actor's handle.
        fqn: the worker class.
        label: its name in messages, such as "rank 3 (policy-0-3)".
        secrets: values that no message may show.
        node_id: the node that it must run on; None where Ray chooses.
    """

    handle: ActorHandle
    fqn: str
    label: str
    secrets: tuple[str, ...] = field(default=(), repr=False)
    node_id: str | None = None


class StaleDescription(Exception):
    """The class differs from its cached description. Holds the current one."""

    def __init__(self, description: ClassDescription) -> None:
        super().__init__(description.fqn)
        self.description = description


def await_started(
    workers: Sequence[StartingWorker], timeout_s: float | None = None, *, stopped: threading.Event | None = None
) -> list[dict[str, Any]]:
    """Wait until the constructor of every worker has returned and its attestation is correct.

    Args:
        workers: the workers to wait for.
        timeout_s: by default `NEMO_RL_WORKER_START_TIMEOUT_S`.
        stopped: set it from another thread to abort the start.

    Returns:
        The attestations, in the order of `workers`.

    Raises:
        WorkerStartError: a worker died (with its traceback), did not answer within `timeout_s`, or `stopped` was set.
        NodeLostError: the node of a worker that has not answered has left the cluster.
        AttestationError: a worker runs in another venv or Ray version than planned.
        StaleDescription: a class differs from its description.
        In every case, and for Ctrl-C, all of `workers` are dead when this raises.
    """
    timeout_s = settings.WORKER_START_TIMEOUT_S.get() if timeout_s is None else timeout_s
    deadline = time.monotonic() + timeout_s
    pending = {getattr(worker.handle, worker_host.ATTEST_METHOD).remote(): i for i, worker in enumerate(workers)}
    answers: dict[int, dict[str, Any]] = {}
    try:
        while pending:
            if stopped is not None and stopped.is_set():
                raise WorkerStartError(f"worker {workers[0].label} was stopped while it started")
            remaining_s = deadline - time.monotonic()
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(max(0.0, remaining_s), _LIVENESS_INTERVAL_S))
            if not ready:
                missing = [workers[i] for i in pending.values()]
                check_nodes_alive((worker.label, worker.node_id) for worker in missing)
                if remaining_s <= 0:
                    raise WorkerStartError(_timeout_message(missing, len(workers), timeout_s))
                continue
            index = pending.pop(ready[0])
            answers[index] = _checked_answer(workers[index], ready[0])
    except BaseException:
        kill_and_wait([worker.handle for worker in workers])
        raise
    return [answers[index] for index in range(len(workers))]


def check_nodes_alive(places: Iterable[tuple[str, str | None]]) -> None:
    """Raise `NodeLostError` if a worker's node has left the cluster; `places` holds workers' labels and node ids.

    A bundle is bound to its node: Ray would keep the workers waiting for the node to return.
    """
    alive = {node.node_id for node in alive_nodes()}
    for label, node_id in places:
        if node_id is not None and node_id not in alive:
            raise NodeLostError(f"worker {label} cannot start: node {node_id} has left the Ray cluster.")


def _checked_answer(worker: StartingWorker, reference: ray.ObjectRef) -> dict[str, Any]:
    try:
        answer = ray.get(reference)
    except RayError as error:
        shown = f"worker {worker.label} of {worker.fqn} died while starting: {error}{_last_output(error)}"
        masked = mask_secrets(shown)
        for secret in worker.secrets:
            masked = masked.replace(secret, settings.MASK)
        # Ray's error repeats the text, so it is chained only if the text contains no secret.
        raise WorkerStartError(masked) from (error if masked == shown else None)
    if "description" in answer:
        raise StaleDescription(ClassDescription.from_plain(answer["description"]))
    if answer["verdict"] != "ok":
        raise AttestationError(
            f"worker {worker.label} of {worker.fqn} on node {answer['node_ip']} runs {answer['executable']}: "
            f"{answer['verdict']}. Its venv was changed or replaced while the job started; start the job again."
        )
    return answer


def _last_output(error: RayError) -> str:
    """Return the last lines that a process without a Python traceback wrote, if it ran on this machine."""
    pid = re.search(r"\bpid: (\d+)", str(error))
    node = current_node()
    if pid is None or node is None:
        return ""
    logs = sorted(Path(node.get_session_dir_path(), "logs").glob(f"worker-*-{pid[1]}.err"))
    try:
        lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
    except OSError:
        return ""
    return "\nThe last lines that it wrote:\n" + "\n".join(lines[-_LAST_LINES:]) if lines else ""


def _timeout_message(missing: Sequence[StartingWorker], total: int, timeout_s: float) -> str:
    labels = abbreviated([worker.label for worker in missing], 8)
    return (
        f"{len(missing)} of {total} workers of {missing[0].fqn} did not start within {timeout_s:.0f} s: {labels}. "
        "Either their constructors are blocked, or their share of the bundles is taken (see `ray status`). "
        f"{settings.WORKER_START_TIMEOUT_S.name} sets the limit."
    )


def kill_and_wait(handles: Sequence[ActorHandle], timeout_s: float = _KILL_TIMEOUT_S) -> bool:
    """Kill actors immediately and wait until Ray reports them dead. Returns whether all are dead."""
    for handle in handles:
        ray.kill(handle, no_restart=True)
    return all_dead(handles, timeout_s)


def all_dead(handles: Sequence[ActorHandle], timeout_s: float | None) -> bool:
    """Wait until every actor has ended. Returns whether all ended within `timeout_s`; None waits without limit."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for handle in handles:
        while True:
            try:
                limit = None if deadline is None else max(0.0, deadline - time.monotonic())
                ray.get(handle.__ray_ready__.remote(), timeout=limit)
            except ActorUnavailableError:  # the node does not answer; Ray has not declared the actor dead yet
                pass
            except WORKER_DEATHS as death:
                death.__traceback__ = (
                    None  # it refers to this error, and so to the caller's group until Python collects it
                )
                break
            except GetTimeoutError:
                return False
            time.sleep(_POLL_S)
    return True
