"""A driver on the first of several hosts. The others have neither this directory nor the project's checkout.

Prints the answers of the workers on all hosts, and whether a venv of this project was built, as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import ray

from nemo_rl.cli.cluster_checks import check_nodes
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.node_venvs import ensure_venv_on_node
from nemo_rl.distributed.ray_actor_environment_registry import register_actor_environment
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES, RayVirtualCluster, init_ray
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup

FQN = "mine.worker.Worker"


def main(project: str, num_hosts: int) -> None:
    logging.basicConfig(level=logging.INFO)
    init_ray()
    while len(alive_nodes()) < num_hosts:
        time.sleep(0.5)
    register_actor_environment(FQN, PY_EXECUTABLES.SYSTEM)
    cluster = RayVirtualCluster([1] * num_hosts, use_gpus=False)
    workers = {"system": answers(cluster, {}), "small": answers(cluster, {"uv": ["small==1.0"]})}
    workers["edited"] = answers_after_edit(cluster, Path(project, "mine", "fresh.py"))
    cluster.shutdown()
    driver_node = ray.get_runtime_context().get_node_id()
    other = next(node.node_id for node in alive_nodes() if node.node_id != driver_node)
    checked = {
        node.node_id: [f"{check.name}: {check.found}" for check in node.checks if check.state == "fatal"]
        for node in check_nodes()
    }
    entry = ensure_venv_on_node(other, f"uv run --locked --project {project}", "mine.Project")
    print(json.dumps({**workers, "driver_node": driver_node, "built": entry.built, "checked": checked}))
    ray.shutdown()


def answers(cluster: RayVirtualCluster, runtime_env: dict[str, Any]) -> list[dict[str, Any]]:
    group = RayWorkerGroup(cluster, RayWorkerBuilder(FQN, runtime_env=runtime_env))
    try:
        return ray.get(group.run_all_workers_single_data("answer"))
    finally:
        group.shutdown()


def answers_after_edit(cluster: RayVirtualCluster, module: Path) -> list[dict[str, Any]]:
    """Edit a module as in a notebook, and restore it."""
    text = module.read_text()
    sys.ps1 = ">>> "
    module.write_text(text.replace("changed", "edited in the session"))
    try:
        return answers(cluster, {})
    finally:
        module.write_text(text)
        del sys.ps1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
