"""Pipelines on a real Ray cluster. All executors give the same result, also when tasks fail or workers die."""

from __future__ import annotations

import gc
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
from sample_stages import (
    TINY,
    AddOne,
    Failing,
    KeepFirstOfEach,
    KillsWorker,
    SplitRows,
    batches,
    numbers,
)

from nemo_rl.errors import ResourceInsufficientError, StageError, StageInputError, StageOutputError, StageStartError
from nemo_rl.pipelines import (
    DocumentBatch,
    EmptyTask,
    Executor,
    GatherStage,
    Pipeline,
    ProcessingStage,
    RayActorPoolExecutor,
    RayDataExecutor,
    Resources,
    Task,
    failed_tasks,
    processing_stage,
)

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.mark.parametrize("executor", ["actor_pool", "ray_data"], indirect=True)
def test_results_keep_the_input_order(executor: Executor) -> None:
    pipeline = Pipeline("p", stages=[AddOne(), SplitRows(), AddOne().with_(name="again", batch_size=3)])
    tasks = pipeline.run(executor, batches(40))
    assert numbers(tasks) == list(range(2, 82))
    assert [len(task.to_pandas()) for task in tasks] == [1] * 80
    assert [perf.stage for perf in tasks[7]._stage_perf] == ["AddOne", "SplitRows", "again"]
    assert len({task._lineage for task in tasks}) == 80

    class DropEven(SplitRows):
        drop_divisor = 4

    assert numbers(Pipeline("p", stages=[DropEven()]).run(executor, batches(6))) == [2, 3, 6, 7, 10, 11]


@pytest.mark.slow  # starts Ray Data
def test_ray_data_stages_share_workers_if_they_ask_for_the_same() -> None:
    stages = [
        AddOne().with_(name="first"),
        AddOne().with_(name="same"),
        AddOne().with_(name="more CPUs", resources=Resources(cpus=1)),
        AddOne().with_(name="exact number", resources=Resources(cpus=1), num_workers=1),
    ]
    (task,) = Pipeline("p", stages=stages).run(RayDataExecutor(), batches(1))
    assert numbers([task]) == [4, 5]
    worker = {perf.stage: perf.worker for perf in task._stage_perf}
    assert worker["first"] == worker["same"]
    assert len(set(worker.values())) == 3


def test_first_stage_creates_the_tasks(executor: Executor) -> None:
    @processing_stage(name="count", resources=TINY)
    def count(task: EmptyTask) -> list[DocumentBatch]:
        assert isinstance(task, EmptyTask)
        return batches(5)

    assert numbers(Pipeline("p", stages=[count, AddOne()]).run(executor)) == list(range(1, 11))


def test_custom_tasks_and_script_functions(executor: Executor) -> None:
    def double(task: Task[int]) -> Task[int]:
        return Task(task.task_id, task.dataset_name, 2 * task.data)

    def keep_large(task: Task[int]) -> Task[int] | None:
        return task if task.data > 10 else None

    tasks = [Task(str(i), "ints", i) for i in range(20)]
    result = Pipeline("p", stages=[double, keep_large]).run(executor, tasks)
    assert [(task.task_id, task.data) for task in result] == [(str(i), 2 * i) for i in range(6, 20)]


def test_gather_stage_receives_all_tasks(executor: Executor, tmp_path: Path) -> None:
    stages = [AddOne(), KeepFirstOfEach(7), AddOne().with_(name="last")]
    result = Pipeline("p", stages=stages).run(executor, batches(10))
    assert numbers(result) == [n + 1 for n in range(1, 8)]
    first = Pipeline("p", stages=[KeepFirstOfEach(3)]).run(executor, batches(10), run_dir=tmp_path)
    assert numbers(first) == [0, 1, 2]


def test_failing_task_stops_the_run(executor: Executor) -> None:
    with pytest.raises(StageError, match=r"'Failing'.*'b3'.*ValueError: cannot take 7") as caught:
        Pipeline("p", stages=[AddOne(), Failing([7])]).run(executor, batches(8))
    assert (caught.value.stage, caught.value.task_id) == ("Failing", "b3")
    assert "in process" in caught.value.traceback_text
    assert str(caught.value).endswith("cannot take 7\n")  # no executor adds text


def test_failed_run_returns_its_cpus(executor: Executor) -> None:
    gc.collect()
    gc.disable()  # no chance collection may release the workers
    try:
        with pytest.raises(StageError) as failure:
            Pipeline("p", stages=[Failing([3, 11]), AddOne()]).run(executor, batches(8))
        deadline = time.monotonic() + 300
        while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
            assert time.monotonic() < deadline, f"{failure.value} keeps {ray.available_resources()}"
            time.sleep(0.2)
    finally:
        gc.enable()


def test_failing_task_is_set_aside(
    executor: Executor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NEMO_RL_PROGRESS", "plain")
    pipeline = Pipeline("p", stages=[AddOne(), Failing([3, 12]).with_(batch_size=4)])
    result = pipeline.run(executor, batches(8), run_dir=tmp_path, max_retries=1)
    summary = (
        f"2 tasks failed and were set aside in {tmp_path}/failed: 2 of stage 'Failing' (ValueError: cannot take 3)"
    )
    assert summary in caplog.text
    shown = capsys.readouterr().err
    assert "pipeline p: preparing 2 stages\n" in shown
    assert shown.count("pipeline p, stage AddOne: 8 tasks done, 0 failed in ") == 1
    assert re.search(r"pipeline p, stage Failing: \d+ tasks done, 2 failed in ", shown)
    assert f"pipeline p: {len(result)} results in " in shown
    assert numbers(result) == [n for n in range(1, 17) if n not in (3, 4, 11, 12)]
    failed = failed_tasks(tmp_path)
    assert [(f.stage, f.task_id, f.attempts) for f in failed] == [("Failing", "b1", 2), ("Failing", "b5", 2)]
    assert "cannot take 3" in failed[0].error
    assert "Traceback" in failed[0].traceback
    assert numbers([failed[0].load()]) == [3, 4]  # the input of the stage
    retried = Pipeline("p", stages=[AddOne()]).run(executor, [task.load() for task in failed])
    assert numbers(retried) == [4, 5, 12, 13]


def test_retries_receive_the_original_task(executor: Executor) -> None:
    stage = Failing([5], num_times=2).with_(max_retries=2, num_workers=1)
    assert numbers(Pipeline("p", stages=[stage, AddOne()]).run(executor, batches(4))) == [1, 2, 3, 4, 0, 0, 7, 8]


def test_worker_death_loses_no_task(executor: Executor, tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    stage = KillsWorker(9, str(deaths), num_times=1).with_(batch_size=2)
    result = Pipeline("p", stages=[AddOne(), stage, AddOne().with_(name="last")]).run(executor, batches(16))
    assert numbers(result) == list(range(2, 34))
    assert len(list(deaths.iterdir())) == 1


@pytest.mark.slow
def test_task_that_kills_workers_is_set_aside(tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    stage = KillsWorker(9, str(deaths), num_times=99)
    executor = RayActorPoolExecutor(max_worker_deaths=2)
    result = Pipeline("p", stages=[AddOne(), stage]).run(executor, batches(32), run_dir=tmp_path / "run")
    assert numbers(result) == [n for n in range(1, 65) if n not in (9, 10)]
    (failed,) = failed_tasks(tmp_path / "run")
    assert (failed.task_id, failed.attempts) == ("b4", 3)
    assert "its worker died 3 times" in failed.error
    assert numbers([failed.load()]) == [9, 10]  # although the task was on disk between two stages
    assert json.loads((tmp_path / "run" / "stages.json").read_text())[1]["failed"] == 1


class NoTask(ProcessingStage[DocumentBatch, DocumentBatch]):
    resources = TINY

    def process(self, task: DocumentBatch) -> str:  # type: ignore[override]
        return "text"


class BadSetup(ProcessingStage[DocumentBatch, DocumentBatch]):
    resources = TINY

    def setup(self) -> None:
        raise OSError("no model here")

    def process(self, task: DocumentBatch) -> DocumentBatch:
        return task


class MixedColumn(ProcessingStage[DocumentBatch, DocumentBatch]):
    resources = TINY

    def process(self, task: DocumentBatch) -> DocumentBatch:
        return task.with_data(task.to_pandas().assign(mixed=[1, "one"]))


def test_invalid_stage_output_names_the_stage(executor: Executor) -> None:
    with pytest.raises(StageOutputError, match=r"'NoTask'.*returned a str \('text'\), not a task"):
        Pipeline("p", stages=[NoTask()]).run(executor, batches(1))
    with pytest.raises(StageStartError, match=r"'BadSetup' could not be set up: OSError: no model here"):
        Pipeline("p", stages=[BadSetup()]).run(executor, batches(1))
    with pytest.raises(StageOutputError, match=r"'MixedColumn'.*cannot be turned into an Arrow table.*mixed"):
        Pipeline("p", stages=[MixedColumn()]).run(executor, batches(1))

    def rename(task: DocumentBatch) -> DocumentBatch:
        return task.with_data(task.to_pandas().rename(columns={"number": "n"}))

    with pytest.raises(StageInputError, match=r"'AddOne': batch 'b0' has no column 'number'; its columns are \['n'\]"):
        Pipeline("p", stages=[rename, AddOne()]).run(executor, batches(1))


class Pairs(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Merges each batch of tasks into one task."""

    resources = TINY
    batch_size = 4

    def process_batch(self, tasks: list[DocumentBatch]) -> list[DocumentBatch]:
        return [tasks[0].with_data(pd.concat([task.to_pandas() for task in tasks]))]


def test_merging_tasks_is_refused_with_run_dir(executor: Executor, tmp_path: Path) -> None:
    pipeline = Pipeline("p", stages=[Pairs(), AddOne()])
    merged = pipeline.run(executor, batches(8))
    assert numbers(merged) == list(range(1, 17))
    assert len(merged) == 2
    with pytest.raises(StageOutputError, match=r"'Pairs'.* 1 entries for \d tasks.*needs one entry per task"):
        pipeline.run(executor, batches(8), run_dir=tmp_path)


class OncePerNode(ProcessingStage[DocumentBatch, DocumentBatch]):
    resources = TINY

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup_on_node(self) -> None:
        Path(self.folder, f"node-{os.getpid()}").touch()

    def setup(self) -> None:
        assert list(Path(self.folder).glob("node-*"))
        Path(self.folder, f"worker-{os.getpid()}").touch()

    def process(self, task: DocumentBatch) -> DocumentBatch:
        return task

    def teardown(self) -> None:
        Path(self.folder, f"end-{os.getpid()}").touch()


def test_setup_and_teardown(tmp_path: Path) -> None:
    stage = OncePerNode(str(tmp_path)).with_(num_workers=2)
    Pipeline("p", stages=[stage]).run(RayActorPoolExecutor(), batches(16))
    assert len(list(tmp_path.glob("node-*"))) == 1
    workers = {path.name.partition("-")[2] for path in tmp_path.glob("worker-*")}
    assert {path.name.partition("-")[2] for path in tmp_path.glob("end-*")} == workers
    assert 1 <= len(workers) <= 2


class FirstTask(GatherStage[DocumentBatch, DocumentBatch]):
    resources = TINY

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def process_all(self, tasks: Sequence[DocumentBatch]) -> Any:
        yield tasks[0]

    def teardown(self) -> None:
        Path(self.folder, "end").touch()


def test_gather_stage_teardown(tmp_path: Path) -> None:
    result = Pipeline("p", stages=[FirstTask(str(tmp_path))]).run(RayActorPoolExecutor(), batches(3))
    assert numbers(result) == [0, 1]
    assert (tmp_path / "end").exists()


def test_insufficient_resources(executor: Executor) -> None:
    with pytest.raises(ResourceInsufficientError, match=r"'AddOne' asks for 64 CPUs and 0 GPUs.* have 4 CPUs"):
        Pipeline("p", stages=[AddOne().with_(resources=Resources(cpus=64))]).run(executor, batches(1))
    with pytest.raises(ResourceInsufficientError, match=r"8 GB of a GPU's memory; the cluster has no GPU"):
        Pipeline("p", stages=[AddOne().with_(resources=Resources(gpu_memory_gb=8))]).run(executor, batches(1))


def test_progress_and_stages_file(executor: Executor, tmp_path: Path) -> None:
    seen: list[str] = []
    pipeline = Pipeline("p", stages=[AddOne(), SplitRows(), Failing([5])])
    pipeline.run(executor, batches(6), run_dir=tmp_path, progress=lambda stages: seen.append(str(stages[-1])))
    assert "Failing: 12 tasks done" in seen[-1]
    assert "0 queued, 1 failed" in seen[-1]
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert [(s["stage"], s["tasks_in"], s["tasks_out"], s["failed"]) for s in stages] == [
        ("AddOne", 6, 6, 0),
        ("SplitRows", 6, 12, 0),
        ("Failing", 12, 11, 1),
    ]
