"""Runs a pipeline over ten times more data than shared memory holds, and prints sums and peak memory as JSON."""

from __future__ import annotations

import json
import os
import resource
import sys

import numpy as np
import pyarrow as pa
import ray

from nemo_rl.pipelines import DocumentBatch, Pipeline, ProcessingStage, RayActorPoolExecutor, RayDataExecutor, Task

STORE_BYTES = 100 * 2**20
NUM_TASKS = 50
ROWS = 5 * 2**19  # 20 MiB


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Make(ProcessingStage[Task[int], DocumentBatch]):
    def process(self, task: Task[int]) -> DocumentBatch:
        return DocumentBatch(task.task_id, "d", pa.table({"x": np.full(ROWS, task.data, dtype=np.int64)}))


class Pass(ProcessingStage[DocumentBatch, DocumentBatch]):
    def process(self, task: DocumentBatch) -> DocumentBatch:
        return task.with_data(pa.table({"x": task.to_pyarrow()["x"].to_numpy() + 1}))


class Sum(ProcessingStage[DocumentBatch, Task[dict]]):
    def process(self, task: DocumentBatch) -> Task[dict]:
        total = int(task.to_pyarrow()["x"].to_numpy().sum())
        return Task(task.task_id, "d", {"sum": total, "peak_mb": peak_mb()})


def main(executor: str) -> None:
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray.init("local", num_cpus=3, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False)
    chosen = {"actor_pool": RayActorPoolExecutor, "ray_data": RayDataExecutor}[executor](max_workers_per_stage=1)
    before = peak_mb()
    tasks = Pipeline("p", stages=[Make(), Pass(), Sum()]).run(chosen, [Task(str(i), "d", i) for i in range(NUM_TASKS)])
    result = {
        "sums": [task.data["sum"] // ROWS for task in tasks],
        "driver_growth_mb": peak_mb() - before,
        "worker_mb": max(task.data["peak_mb"] for task in tasks),
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
