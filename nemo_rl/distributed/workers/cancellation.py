"""Cancels the calls that run on workers, without ending the workers.

::

    driver ── CANCEL_SIGNAL, from a process on the worker's node ──► the running call raises, queued calls are dropped
           ── or nrl_cancel__, for a class with coroutines ────────► coroutines are cancelled, queued ones are dropped
           ── nrl_resume__, after all of them ─────────────────────► later calls run

Ray cancels a queued actor task and a coroutine, but a running method only if the method asks Ray for it, and it needs
the reference of each call.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from nemo_rl.distributed.cluster.node_calls import call_on_nodes, collect_answers
from nemo_rl.distributed.provisioning.source_sync import task_options
from nemo_rl.distributed.workers import host as worker_host

# A signal that arrives just before the worker's main thread blocks in a system call does not end that call, so signals
# are repeated. The worker interrupts a call again only after some seconds, in which the call may clean up.
_REPEAT_S = 1.0


def cancel_calls(
    handles: Sequence[ActorHandle], attestations: Sequence[Mapping[str, Any]], timeout_s: float
) -> list[int]:
    """Cancel the calls that run or wait on workers.

    Args:
        handles: the workers.
        attestations: of the same workers.
        timeout_s: seconds to wait until the workers are idle.

    Returns:
        Indices of the workers that are still busy: a call is in code that Python cannot interrupt.
    """
    deadline = time.monotonic() + timeout_s
    busy = list(range(len(handles)))
    while busy:
        remaining_s = max(0.0, deadline - time.monotonic())
        _cancel([(handles[index], attestations[index]) for index in busy], remaining_s)
        resumed = {getattr(handles[index], worker_host.RESUME_METHOD).remote(): index for index in busy}
        remaining_s = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait(list(resumed), num_returns=len(resumed), timeout=min(remaining_s, _REPEAT_S))
        busy = sorted(set(busy) - {resumed[reference] for reference in done})
        if remaining_s == 0:
            break
    return busy


def _cancel(workers: Sequence[tuple[ActorHandle, Mapping[str, Any]]], timeout_s: float) -> None:
    processes: dict[str, list[tuple[int, int]]] = {}
    references = []
    for handle, attestation in workers:
        if attestation["cancelled_by"] == "signal":
            processes.setdefault(attestation["node_id"], []).append((attestation["pid"], attestation["start_ticks"]))
        elif attestation["cancelled_by"] == "method":
            references.append(getattr(handle, worker_host.CANCEL_METHOD).remote())
    _send_signals(processes.pop(ray.get_runtime_context().get_node_id(), []))
    remote = call_on_nodes(_send_signals, {node_id: (pids,) for node_id, pids in processes.items()}, task_options)
    collect_answers(remote, timeout_s)  # the workers of a node that does not answer stay busy
    if references:
        ray.wait(references, num_returns=len(references), timeout=timeout_s)


def _send_signals(processes: Sequence[tuple[int, int]]) -> None:
    """Send `CANCEL_SIGNAL` to processes of this node, given by pid and start, because pids are reused."""
    for pid, start_ticks in processes:
        with contextlib.suppress(OSError):  # the process has ended
            if worker_host.start_ticks(pid) == start_ticks:
                os.kill(pid, worker_host.CANCEL_SIGNAL)
