"""A later run of the same stage uses the process of an earlier run, and only where that cannot be noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from nemo_rl import settings
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.kept_workers import STAGE_WORKERS
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.pipelines import GatherStage, Pipeline, ProcessingStage, Resources, Task, loaded_code
from nemo_rl.pipelines.loaded_code import LoadedCode

pytestmark = pytest.mark.usefixtures("ray_local")

_PATIENCE_S = 60.0


class Facts(ProcessingStage[Task[Any], Task[Any]]):
    """Returns its process id, the threads that it may use, and how often this object has been set up and called."""

    def __init__(self, folder: str = "", option: Any = None) -> None:
        self.folder = folder
        self.option = option
        self.num_setups = self.num_calls = 0

    def setup(self) -> None:
        self.num_setups += 1

    def process(self, task: Task[Any]) -> Task[Any]:
        self.num_calls += 1
        facts = {
            "pid": os.getpid(),
            "setups": self.num_setups,
            "calls": self.num_calls,
            "threads": os.environ["OMP_NUM_THREADS"],
            "variable": os.environ.get("STAGE_VARIABLE"),
        }
        return Task(task.task_id, task.dataset_name, facts)

    def teardown(self) -> None:
        if self.folder:
            Path(self.folder, str(time.time_ns())).touch()


@pytest.fixture(autouse=True)
def _no_kept_workers() -> Iterator[None]:
    yield
    STAGE_WORKERS.release()


def run(*stages: Any) -> dict[str, Any]:
    (task,) = Pipeline("p", stages=stages).run(initial_tasks=[Task("t", "d", {})])
    return task.data


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def test_same_stage_runs_in_the_same_process_as_a_new_object(tmp_path: Path) -> None:
    first = run(Facts(str(tmp_path)))
    second = run(Facts(str(tmp_path)))
    assert second == first  # including the process id
    assert (second["setups"], second["calls"]) == (1, 1)
    assert len(list(tmp_path.iterdir())) == 2  # torn down after each run


class GathersPid(GatherStage[Task[Any], Task[Any]]):
    def process_all(self, tasks: Sequence[Task[Any]]) -> Iterator[Task[Any]]:
        for task in tasks:
            yield Task(task.task_id, task.dataset_name, os.getpid())


def test_a_gather_stage_runs_in_the_same_process() -> None:
    assert run(GathersPid()) == run(GathersPid())


def test_idle_workers_hold_no_cpus() -> None:
    run(Facts())
    assert len(STAGE_WORKERS) == 1

    @ray.remote(num_cpus=4)
    def takes_all() -> int:
        return 1

    assert ray.get(takes_all.remote(), timeout=_PATIENCE_S) == 1
    assert len(STAGE_WORKERS) == 1


@pytest.mark.slow  # starts many workers
def test_more_stages_than_cpus_are_all_kept() -> None:
    def pids() -> list[int]:
        stages = [Facts().with_(name=str(i), resources=Resources(cpus=2)) for i in range(4)]
        found = []
        for number, stage in enumerate(stages, start=1):
            found.append(run(*stages[: number - 1], stage)["pid"])
        return found

    first = pids()
    assert len(set(first)) == 4
    assert pids() == first


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda stage: stage.with_(name="other"), marks=pytest.mark.slow, id="name"),
        pytest.param(lambda stage: stage.with_(resources=Resources(cpus=2)), marks=pytest.mark.slow, id="resources"),
        pytest.param(lambda stage: stage.with_(runtime_env={"env_vars": {"STAGE_VARIABLE": "2"}}), id="env_vars"),
        pytest.param(lambda stage: stage.with_(runtime_env={"uv": ["packaging==24.0"]}), id="venv"),
        pytest.param(lambda stage: Facts(option=2), marks=pytest.mark.slow, id="attribute"),
    ],
)
def test_another_stage_runs_in_another_process(change: Callable[[Any], Any]) -> None:
    def stage() -> Any:
        return Facts(option=1).with_(runtime_env={"env_vars": {"STAGE_VARIABLE": "1"}})

    first, other, again = run(stage()), run(change(stage())), run(stage())
    assert other["pid"] != first["pid"]
    assert again["pid"] == first["pid"]
    assert (first["variable"], again["variable"]) == ("1", "1")


def test_other_code_of_a_local_class_runs_in_another_process() -> None:
    def stage(factor: int) -> Any:
        class Local(Facts):
            def process(self, task: Task[Any]) -> Task[Any]:
                return Task(task.task_id, task.dataset_name, (os.getpid(), factor))

        return Local()

    (first_pid, one), (second_pid, two) = run(stage(1)), run(stage(2))  # type: ignore[misc]
    assert (one, two) == (1, 2)
    assert first_pid != second_pid


def test_a_forwarded_variable_that_changes_reaches_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    class Token(Facts):
        def process(self, task: Task[Any]) -> Task[Any]:
            return Task(task.task_id, task.dataset_name, os.environ.get("HF_HUB_OFFLINE"))

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(Token()) == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert run(Token()) == "0"


MODULE = """
import os
from nemo_rl.pipelines import ProcessingStage, Task

class Edited(ProcessingStage):
    def process(self, task):
        return Task(task.task_id, task.dataset_name, (os.getpid(), "{version}"))
"""


@pytest.mark.slow  # starts workers for each version
def test_an_edited_module_is_imported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "edited_stage.py"
    monkeypatch.syspath_prepend(tmp_path)
    module.write_text(MODULE.format(version="old"))
    time.sleep(0.1)  # more than a tick of the file system's clock
    import edited_stage  # type: ignore[import-not-found]

    first = run(edited_stage.Edited())
    assert run(edited_stage.Edited()) == first
    status = module.stat()
    module.write_text(MODULE.format(version="new"))  # of the same length
    os.utime(module, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    pid, version = run(edited_stage.Edited())  # type: ignore[misc]
    assert version == "new"
    assert pid != first[0]  # type: ignore[index]


def test_dead_worker_is_replaced() -> None:
    pid = run(Facts())["pid"]
    os.kill(pid, signal.SIGKILL)
    assert run(Facts())["pid"] != pid


class OnceOnly(Facts):
    """Cannot be set up twice in one process."""

    def setup(self) -> None:
        sys.modules["set_up_once"] = sys if "set_up_once" not in sys.modules else 1 // 0  # type: ignore[assignment]


class Leaves(Facts):
    def process(self, task: Task[Any]) -> Task[Any]:
        os.environ["LEFT_BEHIND"] = "1"
        return super().process(task)


@pytest.mark.parametrize("stage_class", [OnceOnly, Leaves])
def test_a_stage_that_marks_its_process_gets_a_new_one(stage_class: type[Facts], tmp_path: Path) -> None:
    def once(attempt: str) -> Any:
        (task,) = Pipeline("p", stages=[stage_class()]).run(
            initial_tasks=[Task("t", "d", {})], run_dir=tmp_path / attempt
        )
        return task.data["pid"]

    assert once("1") != once("2")
    assert not list(tmp_path.glob("*/stopped-*"))


def test_the_number_of_kept_workers_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.KEEP_STAGE_WORKERS.name, "1")
    stages = [Facts().with_(name="one"), Facts().with_(name="two")]
    one, two = run(stages[0])["pid"], run(stages[1])["pid"]
    assert len(STAGE_WORKERS) == 1
    wait_until(lambda: not psutil.pid_exists(one))
    assert run(stages[1])["pid"] == two
    monkeypatch.setenv(settings.KEEP_STAGE_WORKERS.name, "0")
    assert run(stages[1])["pid"] != two


class Meets(ProcessingStage[Task[Any], Task[Any]]):
    """Waits until three workers have a task. Returns the process id and the CPUs that Ray says the worker holds."""

    num_workers = 3

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def process(self, task: Task[Any]) -> Task[Any]:
        (self.folder / str(os.getpid())).touch()
        wait_until(lambda: len(list(self.folder.iterdir())) == 3)
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
        return Task(task.task_id, task.dataset_name, (os.getpid(), cpus))


@pytest.mark.slow  # starts many workers
def test_workers_beyond_the_limit_hold_their_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.KEEP_STAGE_WORKERS.name, "1")
    tasks = Pipeline("p", stages=[Meets(tmp_path)]).run(initial_tasks=[Task(str(i), "d", {}) for i in range(24)])
    assert sorted(cpus for _, cpus in {task.data for task in tasks}) == [0, 1, 1]
    assert len(STAGE_WORKERS) == 1
    wait_until(lambda: [node.free.get("CPU") for node in alive_nodes()] == [4.0])


def test_idle_workers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.KEEP_STAGE_WORKERS_S.name, "0.2")
    pid = run(Facts())["pid"]
    wait_until(lambda: not psutil.pid_exists(pid))
    assert len(STAGE_WORKERS) == 0


def test_a_virtual_cluster_releases_them() -> None:
    pid = run(Facts())["pid"]
    with RayVirtualCluster([1], use_gpus=False) as cluster:
        cluster.bundles()
        wait_until(lambda: not psutil.pid_exists(pid))


@pytest.mark.slow  # starts another driver
def test_they_end_with_the_driver(ray_local: str) -> None:
    script = Path(__file__).with_name("kept_script.py")
    environment = {**os.environ, "RAY_ADDRESS": ray_local}
    done = subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True, text=True)
    pid = int(done.stdout.splitlines()[-1])
    wait_until(lambda: not psutil.pid_exists(pid))


@pytest.mark.slow  # starts workers for each number of CPUs
def test_openmp_threads_follow_the_cpus() -> None:
    assert run(Facts())["threads"] == "1"
    assert run(Facts().with_(resources=Resources(cpus=3)))["threads"] == "3"
    fields = {"env_vars": {"OMP_NUM_THREADS": "2"}}
    assert run(Facts().with_(resources=Resources(cpus=3), runtime_env=fields))["threads"] == "2"


def test_loaded_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "loaded_for_test.py"
    module.write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import loaded_for_test  # type: ignore[import-not-found]  # noqa: F401

    # Other tests of this process have imported modules whose files are gone.
    of_process = loaded_code._module_files
    monkeypatch.setattr(
        loaded_code, "_module_files", lambda: {file for file in of_process() if file.startswith(str(tmp_path))}
    )
    assert not LoadedCode(since=time.time() - 3600).record()  # the file is newer than that
    code = LoadedCode(since=time.time() + 3600)
    assert code.record()
    assert code.is_current()
    os.link(module, tmp_path / "linked.py")
    linked = LoadedCode(since=time.time() + 3600)
    assert linked.record()
    os.link(module, tmp_path / "linked_again.py")  # as a further venv with the same package does
    assert linked.is_current()
    module.rename(tmp_path / "away.py")
    assert not linked.is_current()
    assert not code.is_current()
