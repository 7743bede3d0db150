"""The stage runner, in this process and without Ray."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sample_stages import KeepFirstOfEach, batches, numbers

from nemo_rl.errors import StageInputError
from nemo_rl.pipelines import DocumentBatch, ProcessingStage, Task, failed_tasks
from nemo_rl.pipelines.items import Item
from nemo_rl.pipelines.progress import read_counts
from nemo_rl.pipelines.run import _numbered, _sources
from nemo_rl.pipelines.run_directory import RunDirectory
from nemo_rl.pipelines.runner import StageJob, StageRunner, spool_directory
from nemo_rl.pipelines.spool import Spool, SpooledTasks, SpoolWriter
from nemo_rl.pipelines.stage import AnyStage


def job(stage: AnyStage, directory: Path, **changes: Any) -> StageJob:
    values: dict[str, Any] = {
        "run_id": directory.name,
        "segment": 1,
        "index": 0,
        "attempt": 1,
        "max_retries": 0,
        "on_failure": "set_aside",
        "spools": True,
        "is_last": True,
        "num_cpus": 2.0,
    }
    return StageJob(stage=stage, directory=str(directory), **{**values, **changes})


def items(num_tasks: int) -> list[Item]:
    """Return batches as items, numbered like the inputs of a run."""
    return _numbered(_sources(batches(num_tasks)))


def spooled(directory: Path, num_sources: int) -> list[Any]:
    entries, missing = Spool.read(spool_directory(directory, 1)).results(num_sources)
    assert not missing
    return list(SpooledTasks(entries))


def records(directory: Path) -> list[Any]:
    """Return the records that were set aside, from all files."""
    lines = [line for path in sorted(directory.rglob("*.records.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_gather_needs_all_inputs(tmp_path: Path) -> None:
    """On another node, the directory may be missing or incomplete."""
    stage = KeepFirstOfEach(100)
    for num_present in (0, 5):
        SpoolWriter(spool_directory(tmp_path, 0), 1).write([], items(num_present))
        with pytest.raises(StageInputError, match=rf"{8 - num_present} of 8 inputs are not in .*file system that all"):
            StageRunner(job(stage, tmp_path)).gather(8)
    SpoolWriter(spool_directory(tmp_path, 0), 1).write([], items(8))
    assert StageRunner(job(stage, tmp_path)).gather(8) == 8
    assert numbers(spooled(tmp_path, 8)) == list(range(16))


class SetsAsideOdd(KeepFirstOfEach):
    def process_all(self, tasks: Sequence[DocumentBatch]) -> Any:
        for task in tasks:
            self.set_aside([{"number": int(n)} for n in task.to_pandas()["number"] if n % 2])
            yield task


def test_gather_stores_set_aside_records(tmp_path: Path) -> None:
    SpoolWriter(spool_directory(tmp_path, 0), 1).write([], items(3))
    StageRunner(job(SetsAsideOdd(1), tmp_path)).gather(3)
    assert [record["number"] for record in records(tmp_path)] == [1, 3, 5]


class Changes(ProcessingStage[Task[dict[str, Any]], Task[dict[str, Any]]]):
    """Modifies its task in place, and raises the first `num_times` times."""

    def __init__(self, num_times: int) -> None:
        self.num_times = num_times
        self.seen: list[Any] = []

    def process(self, task: Task[dict[str, Any]]) -> Task[dict[str, Any]]:
        self.seen.append((task.data["n"], task._metadata["tags"][:]))
        task.data["n"] += 1
        task._metadata["tags"].append("changed")
        if len(self.seen) <= self.num_times:
            raise ValueError("again")
        return task


def test_every_attempt_receives_the_original_task(tmp_path: Path) -> None:
    task = Task("t", "d", {"n": 0}, {"tags": []})
    stage = Changes(2)
    outputs = list(StageRunner(job(stage, tmp_path, max_retries=2, is_last=False)).run([Item(task, (0,))]))
    assert stage.seen == [(0, [])] * 3
    assert outputs[0][0].task.data == {"n": 1}
    failing = Changes(99)
    list(StageRunner(job(failing, tmp_path, max_retries=2)).run([Item(task, (0,))]))
    (failed,) = failed_tasks(tmp_path)
    assert (failed.attempts, failed.load().data, failed.load()._metadata) == (3, {"n": 0}, {"tags": []})


class Reports(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Reports each batch, and then raises on the one with `bad`."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def process(self, task: DocumentBatch) -> DocumentBatch:
        first = numbers([task])[0]
        self.dropped("even", 1)
        self.set_aside([{"number": first}])
        if first == self.bad:
            raise ValueError("bad")
        return task


def test_failed_calls_report_nothing(tmp_path: Path) -> None:
    stage_job = job(Reports(4).with_(batch_size=4, max_retries=2), tmp_path)
    list(StageRunner(stage_job).run(items(4)))
    counts = read_counts(stage_job.counts_directory)
    assert (counts.failed, counts.dropped["even"].count) == (1, 3)
    assert [record["number"] for record in records(tmp_path)] == [0, 2, 6]


def test_records_of_calls_are_separate(tmp_path: Path) -> None:
    given = items(4)
    for batch in (given, [given[0], given[3]], [given[0]]):  # a resumed run batches the unfinished tasks differently
        list(StageRunner(job(Reports(99).with_(batch_size=4), tmp_path)).run(batch))
    assert len(list(tmp_path.rglob("*.records.jsonl"))) == 3
    assert {record["number"] for record in records(tmp_path)} == {0, 2, 4, 6}


class CountsNodes(ProcessingStage[DocumentBatch, DocumentBatch]):
    num_nodes = 0

    def setup_on_node(self) -> None:
        self.num_nodes += 1


def test_new_run_sets_up_the_node_again(tmp_path: Path) -> None:
    stage = CountsNodes()
    for run_id in ("a", "a", "b"):
        StageRunner(job(stage, tmp_path, run_id=f"{tmp_path.parent.name}-{run_id}-{os.getpid()}")).start()
    assert stage.num_nodes == 2
    ids = []
    for _ in range(2):
        with RunDirectory.opened(tmp_path / "run", "p", [stage]) as directory:
            directory.begin()
            ids.append(directory.run_id)
        with RunDirectory.opened(tmp_path / "run", "p", [stage]) as directory:
            assert directory.run_id == ids[-1]
        shutil.rmtree(tmp_path / "run")
    assert ids[0] != ids[1]


def test_late_worker_is_ignored_by_the_next_attempt(tmp_path: Path) -> None:
    given = items(4)
    stages = [Reports(4)]
    with RunDirectory.opened(tmp_path, "p", stages) as directory:
        directory.begin()
        late = StageRunner(job(Reports(4), tmp_path, attempt=directory.attempt))
        list(late.run(given[:1]))
    with RunDirectory.opened(tmp_path, "p", stages) as directory:
        list(late.run(given[1:]))  # one task fails
        assert Spool.read(spool_directory(tmp_path, 1)).results(4)[1] == [1, 2, 3]
        list(StageRunner(job(Reports(99), tmp_path, attempt=directory.attempt)).run(given[1:]))
    assert numbers(spooled(tmp_path, 4)) == list(range(8))
