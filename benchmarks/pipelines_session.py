"""Runs one Ray session of bench_pipelines, and prints seconds as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSIONS = {"base": None, "23.2": "packaging==23.2", "24.0": "packaging==24.0"}
NUM_TASKS = 2000


def version_seen(task: Any) -> Any:
    import packaging

    task.data[packaging.__version__] = True
    return task


def add_one(task: Any) -> Any:
    task.data += 1
    return task


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def megabytes_per_venv(directory: Path) -> float:
    """Return the disk space of each of the two extra venvs."""
    blocks = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        blocks[status.st_dev, status.st_ino] = status.st_blocks
    return sum(blocks.values()) * 512 / 1e6 / 2


def ours(executor: str, part: str) -> dict[str, float]:
    from nemo_rl.distributed.cluster.session import init_ray
    from nemo_rl.pipelines import (
        FunctionStage,
        Pipeline,
        RayActorPoolExecutor,
        RayDataExecutor,
        Resources,
        Task,
        XennaExecutor,
    )

    init_ray()
    chosen = {"actor pool": RayActorPoolExecutor, "ray data": RayDataExecutor, "xenna": XennaExecutor}[executor]
    # Xenna accounts for CPUs itself, and needs enough CPUs for all stages at the same time.
    options = {"resources": Resources(cpus=0.5)} if executor == "xenna" else {}
    fields = [None, {"pip": [VERSIONS["23.2"]]}, {"uv": [VERSIONS["24.0"]]}]
    stages = [FunctionStage(version_seen, name=str(i), runtime_env=env, **options) for i, env in enumerate(fields)]

    def three_versions() -> None:
        (task,) = Pipeline("versions", stages=stages).run(chosen(), [Task("t", "d", {})])
        assert len(task.data) == 3, task

    seconds = {"first": timed(three_versions)}
    if part == "first":
        seconds["second"] = timed(three_versions)
        seconds["MB per venv"] = megabytes_per_venv(Path(os.environ["NEMO_RL_VENV_DIR"]))
        adding = [FunctionStage(add_one, name=f"add{i}", **options) for i in range(3)]
        tasks = [Task(str(i), "d", i) for i in range(NUM_TASKS)]
        seconds["2000 tasks"] = timed(lambda: Pipeline("adding", stages=adding).run(chosen(), tasks))
    return seconds


def ray_runtime_env(field: str, part: str) -> dict[str, float]:
    import ray

    ray.init("local", include_dashboard=False, log_to_driver=False)

    class Worker:
        def see(self, seen: list[str]) -> list[str]:
            import packaging

            return [*seen, packaging.__version__]

    def three_versions() -> None:
        actors = [
            ray.remote(Worker).options(num_cpus=0.1, runtime_env={field: [wanted]} if wanted else None).remote()
            for wanted in VERSIONS.values()
        ]
        seen: Any = []
        for actor in actors:
            seen = actor.see.remote(seen)
        assert len(set(ray.get(seen))) == 3
        for actor in actors:
            ray.kill(actor)

    seconds = {"first": timed(three_versions)}
    if part == "first":
        seconds["second"] = timed(three_versions)
        resources = Path(ray._private.worker._global_node.get_runtime_env_dir_path())
        seconds["MB per venv"] = megabytes_per_venv(resources / field)
    return seconds


def curation(num_cores: str, num_lines: str) -> dict[str, float]:
    """Measure the curation job on `num_cores` cores, including the start of its workers. Its venvs are built before."""
    cores = sorted(os.sched_getaffinity(0))[: int(num_cores)]
    os.sched_setaffinity(0, cores)  # Ray and its processes inherit the affinity

    from nemo_rl.data.sample_math import write_messy_math
    from nemo_rl.distributed.cluster.session import start_local_ray
    from nemo_rl.jobs.curate_math import CurateConfig, curation_pipeline

    start_local_ray(num_cpus=len(cores), num_gpus=0)
    with tempfile.TemporaryDirectory(prefix="bench-curation-") as scratch:

        def curate(folder: str, lines: int) -> tuple[float, int]:
            out = Path(scratch, folder)
            raw = write_messy_math(out / "raw.jsonl", lines).path
            pipeline = curation_pipeline(CurateConfig(output_dir=str(out)), [str(raw)])
            return timed(lambda: pipeline.run(run_dir=out / "run")), raw.stat().st_size

        curate("venvs", 50)
        seconds, num_bytes = curate("measured", int(num_lines))
    return {"GB/h": num_bytes / 1e9 / (seconds / 3600), "lines/s": int(num_lines) / seconds}


def plain_ray_data() -> dict[str, float]:
    import ray

    ray.init("local", include_dashboard=False, log_to_driver=False)

    class Add:
        def __call__(self, batch: dict) -> dict:
            return {"item": batch["item"] + 1}

    def adding() -> None:
        dataset = ray.data.from_items([{"item": i} for i in range(NUM_TASKS)])
        for _ in range(3):
            dataset = dataset.map_batches(Add, compute=ray.data.ActorPoolStrategy(min_size=1, max_size=2), num_cpus=0.5)
        assert len(dataset.take_all()) == NUM_TASKS

    return {"2000 tasks": timed(adding)}


def main(case: str, part: str) -> None:
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    if case == "plain ray data":
        seconds = plain_ray_data()
    elif case == "curation":
        seconds = curation(*part.split("/"))
    elif case.startswith("ray ") and case != "ray data":
        seconds = ray_runtime_env(case.removeprefix("ray "), part)
    else:
        seconds = ours(case, part)
    sys.stdout.write("\n" + json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
