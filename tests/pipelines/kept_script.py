"""Runs a pipeline on the cluster of RAY_ADDRESS, prints the process ids of its workers, and ends."""

from __future__ import annotations

import os
import sys

from nemo_rl.pipelines import Pipeline, Task


def with_pid(task: Task[int]) -> Task[int]:
    return Task(task.task_id, task.dataset_name, os.getpid())


if __name__ == "__main__":
    (task,) = Pipeline("p", stages=[with_pid]).run(initial_tasks=[Task("t", "d", 0)])
    sys.stdout.write(f"\n{task.data}\n")
