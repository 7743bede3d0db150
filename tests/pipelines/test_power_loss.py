"""Every file of a run that is read back may be empty, cut or full of zeros after a power failure."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_stages import AddOne, batches

from nemo_rl.errors import ConfigError, StageError
from nemo_rl.observability.activities import SESSION, Activity
from nemo_rl.pipelines import RayActorPoolExecutor
from nemo_rl.pipelines.executors.base import recorded_error
from nemo_rl.pipelines.items import Item
from nemo_rl.pipelines.progress import Counts, WorkerCounts, read_counts
from nemo_rl.pipelines.report import write_report
from nemo_rl.pipelines.run import RunRequest, _Run
from nemo_rl.pipelines.run_directory import RunDirectory
from nemo_rl.pipelines.runner import StageJob, spool_directory, stop_file
from nemo_rl.pipelines.spool import SpoolWriter
from nemo_rl.pipelines.stage import AnyStage

NUM_TASKS = 5
# What a power failure leaves of a file whose content had not reached the disk.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "cut": lambda content: content[: len(content) // 2],
    "cut and zeros": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "a block of zeros": lambda content: bytes(4096),
}


@pytest.fixture(params=DAMAGES)
def damage(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(DAMAGES[request.param](path.read_bytes()))

    return apply


def job(directory: Path) -> StageJob:
    values: dict[str, Any] = {"run_id": "r", "segment": 1, "index": 0, "attempt": 1, "max_retries": 0}
    return StageJob(AddOne(), str(directory), **values, on_failure="stop", spools=True, is_last=True, num_cpus=1.0)


def test_error_that_stopped_the_run(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    assert recorded_error(job(tmp_path)) is None
    path = stop_file(job(tmp_path))
    path.write_bytes(pickle.dumps(StageError("stage 'a' failed", stage="a")))
    assert str(recorded_error(job(tmp_path))) == "stage 'a' failed"
    damage(path)
    assert recorded_error(job(tmp_path)) is None


@pytest.mark.parametrize("name", ["run.json", "stages.json"])
def test_report_names_the_damaged_file(tmp_path: Path, damage: Callable[[Path], None], name: str) -> None:
    with RunDirectory.opened(tmp_path, "p", [AddOne()]) as directory:
        directory.begin()
    assert write_report(tmp_path).read_text().startswith("<!DOCTYPE html>")
    damage(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read"):
        write_report(tmp_path)


def test_counts_of_a_worker(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    workers = [WorkerCounts(tmp_path) for _ in range(2)]
    for worker in workers:
        worker.counts.tasks_in = 3
        worker.save()
    damage(sorted(tmp_path.iterdir())[0])
    assert read_counts(tmp_path).tasks_in == 3
    assert read_counts(tmp_path / "absent") == Counts()


def run_of(directory: RunDirectory) -> _Run:
    stages: list[AnyStage] = [AddOne()]
    request = RunRequest("p", stages, None, RayActorPoolExecutor(), directory.path, "stop", 0, None)
    return _Run(request, [{}], directory, Activity(SESSION, "pipeline p"))


def finish_segment(path: Path) -> None:
    with RunDirectory.opened(path, "p", [AddOne()]) as directory:
        directory.begin()
        writer = SpoolWriter(spool_directory(path, 1), directory.attempt)
        writer.write([], [Item(task, (index,)) for index, task in enumerate(batches(NUM_TASKS))])
        assert len(run_of(directory)._finish(1, NUM_TASKS)) == NUM_TASKS


def finished(path: Path) -> int | None:
    """Return the number of results that a resumed run finds in segment 1, or None if it runs the segment again."""
    with RunDirectory.opened(path, "p", [AddOne()]) as directory:
        items = run_of(directory)._finished(1)
    return None if items is None else len(items)


def test_mark_of_a_finished_segment(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    finish_segment(tmp_path)
    assert finished(tmp_path) == NUM_TASKS
    mark = spool_directory(tmp_path, 1) / "complete"
    damage(mark)
    assert finished(tmp_path) is None


def test_finished_segment_that_lost_results_runs_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    finish_segment(tmp_path)
    (log,) = spool_directory(tmp_path, 1).glob("*.log")
    damage(log)
    assert finished(tmp_path) is None
