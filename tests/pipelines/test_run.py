"""Calls of the executor when workers die."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from sample_stages import AddOne, batches, numbers

from nemo_rl.errors import StageError
from nemo_rl.pipelines import Pipeline, RayActorPoolExecutor
from nemo_rl.pipelines.executors.base import Cluster, PlannedStage, WorkersDied
from nemo_rl.pipelines.items import Item

pytestmark = pytest.mark.usefixtures("ray_local")


class DiesAfter(RayActorPoolExecutor):
    """Processes `num_inputs` inputs per call, and dies if there are more."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.calls: list[int] = []

    def run(self, stages: Sequence[PlannedStage], items: Sequence[Item], cluster: Cluster) -> list[Item]:
        self.calls.append(len(items))
        results = super().run(stages, items[: self.num_inputs], cluster) if self.num_inputs else []
        if len(items) > self.num_inputs:
            raise WorkersDied(StageError("the end"))
        return results


@pytest.mark.slow  # restarts workers
def test_worker_deaths_restart_unfinished_inputs(tmp_path: Path) -> None:
    executor = DiesAfter(2)
    tasks = Pipeline("p", stages=[AddOne()]).run(executor, batches(10), run_dir=tmp_path)
    assert numbers(tasks) == list(range(1, 21))
    assert executor.calls == [10, 8, 6, 4, 2]
    assert json.loads((tmp_path / "run.json").read_text())["attempts"] == 5
    assert numbers(Pipeline("p", stages=[AddOne()]).run(executor, batches(10), run_dir=tmp_path)) == numbers(tasks)


@pytest.mark.parametrize("resumable", [True, False])
def test_deaths_without_progress_end_the_run(tmp_path: Path, resumable: bool) -> None:
    executor = DiesAfter(0)
    with pytest.raises(StageError, match="the end"):
        Pipeline("p", stages=[AddOne()]).run(executor, batches(3), run_dir=tmp_path if resumable else None)
    assert executor.calls == [3, 3, 3]
