"""Runs the pipelines of bench_pipelines on NeMo Curator in one Ray session, and prints seconds as JSON.

    python curator_pipelines.py xenna first

Runs in a Python that has nemo-curator and pip, which Ray's `pip` needs. Only its documented interface is used.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NUM_TASKS = 2000
VERSIONS: dict[str, dict[str, list[str]] | None] = {
    "0": None,
    "1": {"pip": ["packaging==23.2"]},
    "2": {"uv": ["packaging==24.0"]},
}
HOLDER = """
import os, sys, ray
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False
cores = len(os.sched_getaffinity(0))
options = {"num_cpus": cores, "num_gpus": 0, "dashboard_host": "127.0.0.1", "log_to_driver": False}
ray.init("local", include_dashboard=True, _node_ip_address="127.0.0.1", _temp_dir=sys.argv[1], **options)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
# What Xenna asks Ray's dashboard for.
LIMIT = {"RAY_MAX_LIMIT_FROM_API_SERVER": "40000"}
# Hides most of what Ray and its workers print.
HIDDEN = {"PYTHONWARNINGS": "ignore", "LOGURU_LEVEL": "ERROR", "RAY_BACKEND_LOG_LEVEL": "error"}


@contextmanager
def ray_session(directory: str) -> Iterator[None]:
    """Start a Ray node on loopback in another process, because an executor ends the session that it starts itself."""
    # A token of this session only. Ray reads it when it is imported.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex())
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        os.environ["RAY_ADDRESS"] = holder.stdout.readline().strip()
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray replaces 127.0.0.1 by an address of the machine
        yield
    finally:
        holder.stdin.close()
        holder.wait()


def megabytes_per_venv(directory: Path) -> float:
    """Return the disk space of each of the two extra venvs."""
    blocks = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        blocks[status.st_dev, status.st_ino] = status.st_blocks
    return sum(blocks.values()) * 512 / 1e6 / 2


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def pipelines(executor: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return functions that run the pipeline with three versions, and the one with many small tasks."""
    from nemo_curator.backends.ray_actor_pool import RayActorPoolExecutor
    from nemo_curator.backends.ray_data import RayDataExecutor
    from nemo_curator.backends.xenna import XennaExecutor
    from nemo_curator.pipeline import Pipeline
    from nemo_curator.stages.base import ProcessingStage
    from nemo_curator.stages.resources import Resources
    from nemo_curator.tasks import Task

    chosen: Any = {"actor pool": RayActorPoolExecutor, "ray data": RayDataExecutor, "xenna": XennaExecutor}[executor]

    class Value(Task):
        @property
        def num_items(self) -> int:
            return 1

        def validate(self) -> bool:
            return True

    class Stage(ProcessingStage):
        name = "stage"
        # Xenna runs all stages at the same time, on a part of the CPUs: 1 of 2.
        resources = Resources(cpus=0.3)

        def inputs(self) -> tuple[list[str], list[str]]:
            return [], []

        def outputs(self) -> tuple[list[str], list[str]]:
            return [], []

    class VersionSeen(Stage):
        def process(self, task: Any) -> Any:
            import packaging

            task.data[packaging.__version__] = True
            return task

    class AddOne(Stage):
        def process(self, task: Any) -> Any:
            task.data += 1
            return task

    def three_versions() -> None:
        stages = [VersionSeen().with_(name=name, runtime_env=fields) for name, fields in VERSIONS.items()]
        (task,) = Pipeline("versions", stages=stages).run(chosen(), [Value("d", {})])
        assert len(task.data) == 3, task

    def small_tasks() -> None:
        stages = [AddOne().with_(name=f"add{i}") for i in range(3)]
        tasks = Pipeline("adding", stages=stages).run(chosen(), [Value("d", i) for i in range(NUM_TASKS)])
        assert len(tasks) == NUM_TASKS

    return three_versions, small_tasks


def main(executor: str, part: str) -> None:
    os.environ.update(LIMIT | HIDDEN)
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory, ray_session(directory):
        three_versions, small_tasks = pipelines(executor)
        seconds = {"first": timed(three_versions)}
        if part == "first":
            seconds["second"] = timed(three_versions)
            resources = Path(directory, "session_latest", "runtime_resources")
            seconds["MB per venv"] = sum(megabytes_per_venv(resources / field) for field in ("pip", "uv"))
            seconds["2000 tasks"] = timed(small_tasks)
    sys.stdout.write("\n" + json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
