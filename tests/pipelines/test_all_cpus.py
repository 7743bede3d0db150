"""The actor pool uses all CPUs of a cluster.

In a module of its own: after a run on Ray Data, a reference in Ray's core sometimes keeps one of its workers, with its
CPUs, until the session ends.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from sample_stages import AddOne, batches, numbers

from nemo_rl.pipelines import DocumentBatch, Pipeline, ProcessingStage, RayActorPoolExecutor, Resources

pytestmark = pytest.mark.usefixtures("ray_local")


class Meets(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Makes each task wait until `num_tasks` tasks are being processed."""

    resources = Resources(cpus=2)

    def __init__(self, folder: str, num_tasks: int) -> None:
        self.folder = folder
        self.num_tasks = num_tasks

    def process(self, task: DocumentBatch) -> DocumentBatch:
        Path(self.folder, f"{task.task_id}").touch()
        deadline = time.monotonic() + 600
        while len(os.listdir(self.folder)) < self.num_tasks:
            assert time.monotonic() < deadline, "no other task started"
            time.sleep(0.05)
        return task


@pytest.mark.slow
def test_few_long_tasks_use_all_cpus(tmp_path: Path) -> None:
    """The first worker does not take both tasks, and a waiting worker of the next stage does not hold the CPUs."""
    last = AddOne().with_(resources=Resources(cpus=2))
    result = Pipeline("p", stages=[Meets(str(tmp_path), 2), last]).run(RayActorPoolExecutor(), batches(2))
    assert numbers(result) == [1, 2, 3, 4]
