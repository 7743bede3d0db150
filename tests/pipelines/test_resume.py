"""A killed run resumes where it stopped, and every input is in the output exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import command_line, running
from sample_stages import AddOne, KeepFirstOfEach, Slow, SplitRows, batches, full_disk, numbers

from nemo_rl.errors import ResumeError, StageError
from nemo_rl.observability.activities import SESSION, Activity
from nemo_rl.pipelines import (
    DocumentBatch,
    Pipeline,
    ProcessingStage,
    RayActorPoolExecutor,
    RayDataExecutor,
    Task,
    failed_tasks,
)
from nemo_rl.pipelines.run import RunRequest, _Run
from nemo_rl.pipelines.run_directory import RunDirectory
from nemo_rl.pipelines.stage import AnyStage, FunctionStage

SCRIPT = Path(__file__).with_name("resume_script.py")
NUM_RECORDS = 40


def start(
    folder: Path, executor: str, seconds: float, *options: str, python: str = sys.executable
) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(SCRIPT.parent)}
    command = [python, str(SCRIPT), str(folder), executor, str(seconds), *options]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_when(process: subprocess.Popen[str], folder: Path, num_taken: int) -> None:
    deadline = time.monotonic() + 600
    while len(list(folder.iterdir())) < num_taken:
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ray_processes = running("ray::", psutil.Process(process.pid).children(recursive=True))
    workers = [each for each in ray_processes if "Agent" not in command_line(each)]  # agents live a while longer
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(workers, timeout=400)
    assert not running("ray::", workers)


def write_input(folder: Path) -> None:
    (folder / "in").mkdir()
    for i in range(NUM_RECORDS // 2):
        lines = [json.dumps({"number": n}) for n in (2 * i, 2 * i + 1)]
        (folder / "in" / f"{i:02}.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "options"),
    [("actor_pool", []), ("ray_data", []), ("xenna", []), ("actor_pool", ["gathers"])],
    ids=str,
)
def test_resume_after_two_sigkills(
    tmp_path: Path, executor: str, options: list[str], request: pytest.FixtureRequest
) -> None:
    python = request.getfixturevalue("xenna_python") if executor == "xenna" else sys.executable
    taken = tmp_path / "taken"
    taken.mkdir()
    write_input(tmp_path)
    # Xenna sends on groups of tasks as a unit, so the first tasks reach the end of the pipeline later.
    for num_taken in (20, 32) if executor == "xenna" else (8, 20):
        kill_when(start(tmp_path, executor, 0.3, *options, python=python), taken, num_taken)
    before = len(list(taken.iterdir()))
    process = start(tmp_path, executor, 0.0, *options, python=python)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert f"{NUM_RECORDS} shards" in output
    written = [json.loads(p.read_text())["number"] for p in sorted((tmp_path / "out").iterdir())]
    assert written == list(range(1, NUM_RECORDS + 1))
    redone = len(list(taken.iterdir())) - before
    assert 0 < redone < NUM_RECORDS  # it resumed instead of starting from the beginning
    again = start(tmp_path, executor, 0.0, *options, python=python).communicate(timeout=400)[0]
    assert f"{NUM_RECORDS} shards" in again
    assert len(list(taken.iterdir())) - before == redone  # a finished run processes nothing


@pytest.mark.slow  # restarts a run
def test_resume_keeps_finished_stages(tmp_path: Path) -> None:
    taken, late = tmp_path / "taken", tmp_path / "late"
    taken.mkdir()
    late.mkdir()
    write_input(tmp_path)
    kill_when(start(tmp_path, "actor_pool", 0.3, "late"), late, 10)
    num_begun = len(list(late.iterdir()))
    process = start(tmp_path, "actor_pool", 0.0, "late")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    written = [json.loads(p.read_text())["number"] for p in sorted((tmp_path / "out").iterdir())]
    assert written == list(range(1, NUM_RECORDS + 1))
    assert len(list(taken.iterdir())) == NUM_RECORDS
    repeated = len(list(late.iterdir())) - NUM_RECORDS
    # Only the groups of the two workers run again. If the stage restarted, all of its tasks would.
    assert 0 <= repeated <= num_begun // 2


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow  # restarts a run
def test_resume_runs_unfinished_inputs_only(tmp_path: Path) -> None:
    """The repeated tasks are the unfinished ones, and the task that succeeds is no longer listed as failed."""
    taken, seen = tmp_path / "taken", tmp_path / "seen"
    taken.mkdir()
    seen.mkdir()

    def pipeline(stop: bool) -> Pipeline:
        def maybe_stop(task):  # type: ignore[no-untyped-def]
            (seen / f"{task.task_id}-{'first' if stop else 'second'}").touch()
            if stop and task.task_id == "b9":
                raise RuntimeError("stop here")
            return task

        last = FunctionStage(maybe_stop, num_workers=1)
        return Pipeline("p", stages=[Slow(str(taken), 0).with_(num_workers=1), last, AddOne()])

    with pytest.raises(StageError, match="stop here"):
        pipeline(True).run(RayActorPoolExecutor(), batches(32), run_dir=tmp_path / "run", on_failure="stop")
    assert [failed.task_id for failed in failed_tasks(tmp_path / "run")] == ["b9"]
    tasks = pipeline(False).run(RayActorPoolExecutor(), batches(32), run_dir=tmp_path / "run")
    assert numbers(tasks) == list(range(1, 65))
    assert len(list(taken.iterdir())) == 32  # the stage before was finished
    first, second = ({path.name.partition("-")[0] for path in seen.glob(f"*-{which}")} for which in ("first", "second"))
    assert first >= {f"b{i}" for i in range(10)}
    # Only the tasks before the failing one are certain to be done: the worker may process more before it stops.
    assert "b9" in second
    assert second.isdisjoint(f"b{i}" for i in range(9))
    assert failed_tasks(tmp_path / "run") == []
    assert list((tmp_path / "run" / "failed").rglob("*.task")) == []


class Lists(ProcessingStage[Task[Any], DocumentBatch]):
    """Lists six tasks in the driver, and drops two documents."""

    runs_in_driver = True

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], ["number"]

    def process(self, task: Task[Any]) -> list[DocumentBatch]:
        self.dropped("odd", 2)
        return batches(6)


@pytest.mark.usefixtures("ray_local")
def test_repeating_a_finished_run_keeps_counts(tmp_path: Path) -> None:
    counts = []
    for _ in range(2):
        Pipeline("p", stages=[Lists(), AddOne()]).run(RayActorPoolExecutor(), run_dir=tmp_path)
        stages = json.loads((tmp_path / "stages.json").read_text())
        counts.append([(s["stage"], s["tasks_in"], s["tasks_out"]) for s in stages])
        assert stages[0]["dropped"]["odd"]["count"] == 2
    assert counts == [[("Lists", 1, 6), ("AddOne", 6, 6)]] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_lineage_is_the_same_on_every_executor(tmp_path: Path) -> None:
    """Lineages name the shards of writers and seed the sampling of models."""

    class Odd(SplitRows):
        drop_divisor = 4

    again = SplitRows().with_(name="again")
    pipeline = Pipeline("p", stages=[Odd(), AddOne(), again])
    names = [
        [task._lineage for task in pipeline.run(executor, batches(6), run_dir=run_dir)]
        for executor, run_dir in (
            (RayActorPoolExecutor(), tmp_path / "stage by stage"),
            (RayDataExecutor(), tmp_path / "streaming"),
            (RayActorPoolExecutor(), None),
        )
    ]
    assert names == [["00001.0", "00001.1", "00003.0", "00003.1", "00005.0", "00005.1"]] * 3


@pytest.mark.usefixtures("ray_local")
def test_finished_run_returns_its_result(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    stages = [Slow(str(taken), 0), KeepFirstOfEach(5), AddOne()]
    results = [
        numbers(Pipeline("p", stages=stages).run(RayActorPoolExecutor(), batches(6), run_dir=tmp_path / "run"))
        for _ in range(2)
    ]
    assert results == [[1, 2, 3, 4, 5]] * 2
    assert len(list(taken.iterdir())) == 6


@pytest.mark.usefixtures("ray_local")
def test_foreign_run_directory_is_refused(tmp_path: Path) -> None:
    Pipeline("p", stages=[AddOne()]).run(RayActorPoolExecutor(), batches(2), run_dir=tmp_path)
    with pytest.raises(ResumeError, match="other stages or other stage options"):
        Pipeline("p", stages=[KeepFirstOfEach(3)]).run(RayActorPoolExecutor(), batches(2), run_dir=tmp_path)
    with pytest.raises(ResumeError, match=r"inputs of the run.*have changed.*input 2 of 2, now 3"):
        Pipeline("p", stages=[AddOne()]).run(RayActorPoolExecutor(), batches(3), run_dir=tmp_path)
    with pytest.raises(ResumeError, match="started on an executor that is stage by stage; this one is streaming"):
        Pipeline("p", stages=[AddOne()]).run(RayDataExecutor(), batches(2), run_dir=tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResumeError, match="cannot be read"):
        Pipeline("p", stages=[AddOne()]).run(RayActorPoolExecutor(), batches(2), run_dir=tmp_path)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow  # restarts a run
def test_gather_respools_input_after_a_kill(tmp_path: Path) -> None:
    class StopsAtFirst(KeepFirstOfEach):
        def process_all(self, tasks: Sequence[DocumentBatch]) -> Any:
            if not (tmp_path / "go").exists():
                raise RuntimeError("stop here")
            yield from super().process_all(tasks)

    pipeline = Pipeline("p", stages=[StopsAtFirst(100)])
    with pytest.raises(StageError, match="stop here"):
        pipeline.run(RayActorPoolExecutor(), batches(10), run_dir=tmp_path / "run")
    spool = tmp_path / "run" / "spool" / "00"
    (log,) = spool.glob("*.log")
    (spool / "complete").unlink()  # as if the run had been killed while writing it
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    (tmp_path / "go").touch()
    result = pipeline.run(RayActorPoolExecutor(), batches(10), run_dir=tmp_path / "run")
    assert numbers(result) == list(range(20))
    (finished,) = (tmp_path / "run" / "spool" / "01").glob("*complete*")  # and no temporary file
    assert finished.read_text() == "10"


def test_full_disk_does_not_mark_a_segment_complete(tmp_path: Path) -> None:
    """An empty `complete` file would make every later attempt fail."""
    stages: list[AnyStage] = [AddOne()]
    with RunDirectory.opened(tmp_path, "p", stages) as directory:
        request = RunRequest("p", stages, None, RayActorPoolExecutor(), tmp_path, "stop", 0, None)
        run = _Run(request, [{}], directory, Activity(SESSION, "pipeline p"))
        with full_disk(0), pytest.raises(OSError, match="too large"):
            run._finish(1, 0)
        assert run._num_sources(1) is None
        run._finish(1, 0)
        assert run._num_sources(1) == 0


def test_run_directory_is_exclusive(tmp_path: Path) -> None:
    with (
        RunDirectory.opened(tmp_path, "p", [AddOne()]),
        pytest.raises(ResumeError, match="in use by another run"),
        RunDirectory.opened(tmp_path, "p", [AddOne()]),
    ):
        pass
