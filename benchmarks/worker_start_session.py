"""Runs one Ray session of bench_worker_start: starts workers in one way, and prints the seconds per start as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTLE_S = 3.0  # processes that Ray prestarts must not compete with the measurement
PLAIN_RAY = {"address": "local", "include_dashboard": False, "num_cpus": 8, "log_to_driver": False}


def main(case: str, python: str, project: str, sources: str) -> None:
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    start = _ours(project, sources) if case == "ours" else _actors(case, python, project)
    time.sleep(SETTLE_S)
    seconds = {"first": start(1), "second": start(1), "8 workers": start(8), "8 workers again": start(8)}
    print(json.dumps(seconds))


def _ours(project: str, sources: str) -> Callable[[int], float]:
    from nemo_rl.distributed.cluster.session import start_local_ray
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup

    start_local_ray(num_cpus=8)

    def start(count: int) -> float:
        with RayVirtualCluster([count], use_gpus=False) as cluster:
            builder = RayWorkerBuilder(
                "bench_start_workers.Worker",
                py_executable=f"uv run --locked --project {project}",
                runtime_env={"env_vars": {"PYTHONPATH": sources}},
            )
            began = time.perf_counter()
            group = RayWorkerGroup(cluster, builder)
            group.get_all_worker_results(group.run_all_workers_single_data("pid"))
            seconds = time.perf_counter() - began
            group.shutdown()
            return seconds

    return start


def _actors(case: str, python: str, project: str) -> Callable[[int], float]:
    import ray

    if case == "ready venv, our session":
        from nemo_rl.distributed.cluster.session import start_local_ray

        start_local_ray(num_cpus=8)
    else:
        ray.init(**PLAIN_RAY)
    options: dict[str, Any] = {
        "plain": {},
        "ready venv": {"py_executable": python},
        "ready venv, our session": {"py_executable": python},
        "ray uv": {"uv": ["packaging==23.2"]},
        "uv run": {"py_executable": f"uv run --locked --project {project}"},
    }[case]

    class Worker:
        def pid(self) -> int:
            return os.getpid()

    def start(count: int) -> float:
        actor_class = ray.remote(num_cpus=1)(Worker).options(runtime_env=options)
        began = time.perf_counter()
        handles = [actor_class.remote() for _ in range(count)]
        ray.get([handle.pid.remote() for handle in handles])
        seconds = time.perf_counter() - began
        for handle in handles:
            ray.kill(handle)
        time.sleep(0.5)  # until their CPUs are free
        return seconds

    return start


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(*sys.argv[1:])
