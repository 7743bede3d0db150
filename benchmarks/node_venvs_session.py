"""Runs one Ray session of bench_node_venvs with simulated nodes and one venv directory. Prints seconds as JSON.

python node_venvs_session.py NUM_NODES PROJECT [--check-64]
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl.distributed import node_venvs
from nemo_rl.distributed.cluster.session import init_ray
from nemo_rl.distributed.node_venvs import ensure_venvs_on_each_node
from nemo_rl.distributed.provisioning import coordinator

SETTLE_S = 3.0  # processes that Ray starts in the background must not compete with the measurement
NUM_VIRTUAL = 64
NUM_VENVS = 4


def main(num_nodes: int, project: str, check_64: bool) -> None:
    base = f"uv run --locked --project {project}"
    cluster = _cluster(num_nodes)
    measured = {
        "Ray's processes": _start_processes(),
        "first": _timed(lambda: ensure_venvs_on_each_node({"bench.First": base}), builds=1),
        "second": _timed(lambda: ensure_venvs_on_each_node({"bench.Second": f"{base} --extra second"}), builds=1),
        "warm": _timed(lambda: ensure_venvs_on_each_node({"bench.First": base}), builds=0),
    }
    ray.shutdown()  # a new driver on the same cluster: Ray starts new processes for its tasks
    init_ray()
    time.sleep(SETTLE_S)
    measured["warm, next job"] = _timed(lambda: ensure_venvs_on_each_node({"bench.First": base}), builds=0)
    if check_64:
        wanted = {f"bench.Worker{i}": f"{base} --extra second" if i % 2 else base for i in range(NUM_VENVS)}
        measured |= _check_virtual_nodes(wanted)
    print(json.dumps(measured))
    ray.shutdown()
    cluster.shutdown()


def _cluster(num_nodes: int) -> Cluster:
    os.environ.update({"RAY_enable_metrics_collection": "0"})  # otherwise 8 simulated nodes keep the cores busy
    cluster = Cluster()
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=1, include_dashboard=False)
    os.environ["RAY_ADDRESS"] = cluster.address
    init_ray()
    time.sleep(SETTLE_S)
    return cluster


def _start_processes() -> float:
    """Start Ray's first process on each node, which takes 0.6 s of CPU time each. Returns the seconds."""

    @ray.remote(num_cpus=0)
    def nothing() -> None:
        pass

    driver_node = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["NodeID"] != driver_node]
    began = time.perf_counter()
    ray.get(
        [nothing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(id_, False)).remote() for id_ in others]
    )
    seconds = time.perf_counter() - began
    time.sleep(SETTLE_S)
    return seconds


def _timed(call: Callable[[], node_venvs.NodeVenvReport], builds: int) -> float:
    began = time.perf_counter()
    report = call()
    seconds = time.perf_counter() - began
    num_built = sum(entry.built for entry in report.entries)
    if num_built != builds:
        raise SystemExit(f"{num_built} builds instead of {builds}")
    return seconds


def _check_virtual_nodes(wanted: dict[str, str]) -> dict[str, float]:
    """Let the driver see 64 virtual nodes, and redirect the request for each to one of the real nodes."""
    real = node_venvs.alive_nodes()
    virtual = [real[0], *(replace(real[i % len(real)], node_id=f"virtual-{i}") for i in range(1, NUM_VIRTUAL))]
    where = {node.node_id: real[i % len(real)].node_id for i, node in enumerate(virtual)}
    submit = coordinator.ProvisioningCoordinator._submit

    def submit_to_real_node(self: Any, task: Any, request: Any) -> Any:
        return submit(self, task, replace(request, node_id=where[request.node_id]))

    node_venvs.alive_nodes = lambda: virtual  # type: ignore[assignment]
    coordinator.ProvisioningCoordinator._submit = submit_to_real_node  # type: ignore[method-assign]
    ensure_venvs_on_each_node(wanted)  # Ray starts a process for each of the 63 requests
    time.sleep(SETTLE_S)
    measured = {}
    for name, clears_cache in (("64 x 4 asked", True), ("64 x 4 known", False)):
        if clears_cache:
            node_venvs._ready.clear()
        cpu = time.process_time()
        measured[name] = _timed(lambda: ensure_venvs_on_each_node(wanted), builds=0)
        measured[f"{name}, driver's CPU"] = time.process_time() - cpu
    return measured


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], "--check-64" in sys.argv)
