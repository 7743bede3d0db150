"""Cancels the calls that run on workers, without ending the workers.

::

    driver ── CANCEL_SIGNAL, from a process on the worker's node ──► the running call raises, queued calls are dropped
           ── nrl_cancel__, queued behind all of them ─────────────► coroutines are cancelled; later calls run

Ray cancels a queued actor task and a coroutine, but a running method only if the method asks Ray for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from nemo_rl.distributed.cluster.node_calls import call_on_nodes, collect_answers
from nemo_rl.distributed.provisioning.source_sync import task_options
from nemo_rl.distributed.workers import host as worker_host


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
    processes: dict[str, list[tuple[int, int]]] = {}
    for attestation in attestations:
        if attestation["can_interrupt"]:
            processes.setdefault(attestation["node_id"], []).append((attestation["pid"], attestation["start_ticks"]))
    local = processes.pop(ray.get_runtime_context().get_node_id(), [])
    _send_signals(local)
    remote = call_on_nodes(_send_signals, {node_id: (pids,) for node_id, pids in processes.items()}, task_options)
    collect_answers(remote, timeout_s)  # the workers of a node that does not answer stay busy
    references = [getattr(handle, worker_host.CANCEL_METHOD).remote() for handle in handles]
    done, _ = ray.wait(references, num_returns=len(references), timeout=timeout_s)
    return [index for index, reference in enumerate(references) if reference not in set(done)]


def _send_signals(processes: Sequence[tuple[int, int]]) -> None:
    """Send `CANCEL_SIGNAL` to processes of this node, given by pid and start, because pids are reused."""
    for pid, start_ticks in processes:
        with contextlib.suppress(OSError):  # the process has ended
            if worker_host.start_ticks(pid) == start_ticks:
                os.kill(pid, worker_host.CANCEL_SIGNAL)
