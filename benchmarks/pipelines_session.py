"""One Ray session of bench_pipelines: runs a case, prints seconds, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
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


def ours(executor: str, part: str) -> dict[str, float]:
    from nemo_rl.distributed.ray_session import init_ray
    from nemo_rl.pipelines import FunctionStage, Pipeline, RayActorPoolExecutor, RayDataExecutor, Task

    init_ray()
    chosen = {"actor pool": RayActorPoolExecutor, "ray data": RayDataExecutor}[executor]
    fields = [None, {"pip": [VERSIONS["23.2"]]}, {"uv": [VERSIONS["24.0"]]}]
    stages = [FunctionStage(version_seen, name=str(i), runtime_env=env) for i, env in enumerate(fields)]

    def three_versions() -> None:
        (task,) = Pipeline("versions", stages=stages).run(chosen(), [Task("t", "d", {})])
        assert len(task.data) == 3, task

    seconds = {"first": timed(three_versions)}
    if part == "first":
        seconds["second"] = timed(three_versions)
        adding = [FunctionStage(add_one, name=f"add{i}") for i in range(3)]
        tasks = [Task(str(i), "d", i) for i in range(NUM_TASKS)]
        seconds["2000 tasks"] = timed(lambda: Pipeline("adding", stages=adding).run(chosen(), tasks))
    return seconds


def rays_own(field: str, part: str) -> dict[str, float]:
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
    return seconds


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
    elif case.startswith("ray ") and case != "ray data":
        seconds = rays_own(case.removeprefix("ray "), part)
    else:
        seconds = ours(case, part)
    sys.stdout.write("\n" + json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
