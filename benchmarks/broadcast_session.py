"""Runs the driver of bench_broadcast on host 0: provides one venv on every node, and prints seconds as JSON.

python broadcast_session.py PROJECT ACCOUNTING...    (one path per host, see broadcast_hosts.cpu_seconds)
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import ray
from broadcast_hosts import cpu_seconds

from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.cluster.session import init_ray
from nemo_rl.distributed.node_venvs import ensure_venvs_on_each_node
from nemo_rl.distributed.provisioning.remote_calls import ask_nodes

START_TIMEOUT_S = 300.0
# Ray starts agents after a node has joined. The agents of eight nodes would slow down everything on two cores.
SETTLE_S = 15.0


def main(project: str, accounting: list[str]) -> None:
    num_nodes = len(accounting)
    init_ray()
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(alive_nodes()) < num_nodes:
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(alive_nodes())} of {num_nodes} nodes joined within {START_TIMEOUT_S:g} s")
        time.sleep(0.5)
    # Ray starts a process on every node first. On real hosts, these do not compete for the same cores.
    answers = ask_nodes(_imported, alive_nodes(), timeout_s=START_TIMEOUT_S)
    assert all(answer is True for _, answer in answers), answers
    time.sleep(SETTLE_S)
    used_before = [cpu_seconds(path) for path in accounting]
    started = time.perf_counter()
    report = ensure_venvs_on_each_node({"bench.Worker": f"uv run --locked --project {project}"})
    seconds = time.perf_counter() - started
    used = [cpu_seconds(path) - before for path, before in zip(accounting, used_before, strict=True)]
    assert len(report.entries) == num_nodes
    assert report.agrees("bench.Worker")
    built = [entry for entry in report.entries if entry.built]
    receiving = [entry.seconds["fetch"] + entry.seconds["link"] for entry in report.entries if entry.received_from]
    measured = {
        "seconds": seconds,
        "build_s": sum(built[0].seconds.values()),
        "receive_s": max(receiving, default=0.0),
        "builders": len(built),
        "cpu_s": statistics.mean(used[1:] or [0.0]),
    }
    print(json.dumps(measured))
    ray.shutdown()


def _imported() -> bool:
    import nemo_rl.distributed.provisioning.broadcast_peer  # noqa: F401

    return True


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
