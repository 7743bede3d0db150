"""Runs pipelines in which Ray's memory monitor kills workers, and prints the results as JSON. See test_low_memory.

`low_memory_script.py MEMINFO FOLDER`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sample_stages import TINY, AddOne, batches, numbers
from simulated_memory import SimulatedMemory

from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.pipelines import DocumentBatch, GatherStage, Pipeline, ProcessingStage, RayActorPoolExecutor, failed_tasks


class Hungry(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Uses up the memory for batches with the number 9, the first `num_times` times."""

    resources = TINY
    num_workers = 1  # the monitor may kill every worker

    def __init__(self, memory: SimulatedMemory, num_times: int) -> None:
        self.memory = memory
        self.num_times = num_times

    def process(self, task: DocumentBatch) -> DocumentBatch:
        if 9 in set(task.to_pandas()["number"]):
            self.memory.use_up(self.name, self.num_times)
        return task


class HungryGather(GatherStage[DocumentBatch, DocumentBatch]):
    """Uses up the memory the first time."""

    resources = TINY

    def __init__(self, memory: SimulatedMemory) -> None:
        self.memory = memory

    def process_all(self, tasks: Sequence[DocumentBatch]) -> Any:
        self.memory.use_up(self.name, 1)
        yield from tasks


def main(meminfo: str, folder: Path) -> None:
    (folder / "deaths").mkdir()
    memory = SimulatedMemory(meminfo, str(folder / "deaths"))
    memory.watch()
    start_local_ray(num_cpus=4, num_gpus=0)
    once = Pipeline("p", stages=[Hungry(memory, 1).with_(name="once"), AddOne()])
    always = Pipeline("p", stages=[Hungry(memory, 99).with_(name="always")])
    gather = Pipeline("p", stages=[HungryGather(memory).with_(name="gather"), AddOne()])
    remaining = always.run(RayActorPoolExecutor(), batches(8), run_dir=folder / "run")
    result = {
        "once": numbers(once.run(RayActorPoolExecutor(), batches(16))),
        "always": numbers(remaining),
        "failed": [(task.task_id, task.error) for task in failed_tasks(folder / "run")],
        "gather": numbers(gather.run(RayActorPoolExecutor(), batches(4))),
        "deaths": {name: memory.num_deaths(name) for name in ("once", "always", "gather")},
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
