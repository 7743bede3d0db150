"""Worker groups in an interactive session: cells that run again, `with`, cancelled calls, edited classes."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup, prepare_venvs
from nemo_rl.errors import CallCancelledError, ResourceInsufficientError, WorkerError
from nemo_rl.venvs.uv import find_uv

pytestmark = pytest.mark.usefixtures("ray_local", "store")

WORKERS = """
import asyncio
import pathlib
import time

import ray


class Plain:
    def __init__(self):
        self.calls = 0

    def block(self, started, seconds=3600.0):
        self.calls += 1
        pathlib.Path(started).touch()
        time.sleep(seconds)

    def spin(self, started):
        self.calls += 1
        pathlib.Path(started).touch()
        while True:
            try:
                sum(range(1000))
            except Exception:
                pass

    def stream(self, started):
        for number in range(10**9):
            pathlib.Path(started).touch()
            yield number

    def interrupt_itself(self):
        raise KeyboardInterrupt

    def fail(self):
        raise RuntimeError("no")

    def num_calls(self):
        return self.calls


class Async:
    def __init__(self):
        self.calls = 0

    async def block(self, started):
        self.calls += 1
        pathlib.Path(started).touch()
        await asyncio.sleep(3600)

    async def stream(self, started):
        while True:
            pathlib.Path(started).touch()
            yield 1
            await asyncio.sleep(3600)

    async def num_calls(self):
        return self.calls


@ray.remote(max_concurrency=2, concurrency_groups={"other": 1})
class Narrow(Async):
    @ray.method(concurrency_group="other")
    async def in_other(self, started):
        await self.block(started)


class Threaded:
    def block(self, started, seconds=3600.0):
        pathlib.Path(started).touch()
        time.sleep(seconds)

    def num_calls(self):
        return 0
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    (directory / "session_workers.py").write_text(WORKERS)
    return directory


@pytest.fixture(scope="module")
def cluster(ray_local: str) -> Iterator[RayVirtualCluster]:
    with RayVirtualCluster([2], use_gpus=False) as virtual_cluster:
        yield virtual_cluster


def builder(sources: Path, name: str = "Plain", **runtime_env: Any) -> RayWorkerBuilder:
    return RayWorkerBuilder(
        f"session_workers.{name}" if "." not in name else name,
        py_executable=sys.executable,
        runtime_env={"env_vars": {"PYTHONPATH": str(sources)}, **runtime_env},
    )


def call(group: RayWorkerGroup, method: str, **kwargs: Any) -> list[Any]:
    return group.get_all_worker_results(group.run_all_workers_single_data(method, **kwargs))


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 600
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the call has not started"
        time.sleep(0.01)


def run_cell(source: str, names: dict[str, Any]) -> None:
    """Run statements as a notebook does: each is compiled when it runs."""
    exec(compile(source, "<cell>", "exec"), names)


# --- cancelling --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(cluster: RayVirtualCluster, sources: Path) -> Iterator[RayWorkerGroup]:
    with RayWorkerGroup(cluster, builder(sources)) as group:
        yield group


@pytest.mark.parametrize("method", ["block", "spin"])
def test_cancel_interrupts_running_calls_and_drops_queued_ones(
    plain: RayWorkerGroup, tmp_path: Path, method: str
) -> None:
    before = call(plain, "num_calls")
    started = [tmp_path / str(rank) for rank in range(2)]
    running = plain.run_all_workers_multiple_data(method, started=[str(path) for path in started])
    queued = plain.run_all_workers_single_data(method, started=str(tmp_path / "queued"))
    wait_for(*started)
    assert plain.cancel()
    for references in (running, queued):
        with pytest.raises(CallCancelledError, match="Plain was cancelled"):
            plain.get_all_worker_results(references)
    assert call(plain, "num_calls") == [count + 1 for count in before]  # the state stays, and queued calls never ran
    assert not (tmp_path / "queued").exists()


def test_cancel_reaches_calls_that_begin_at_the_same_moment(plain: RayWorkerGroup, tmp_path: Path) -> None:
    """A signal may arrive just before the method blocks in a system call."""
    for _ in range(100):
        references = plain.run_all_workers_single_data("block", started=str(tmp_path / "started"))
        assert plain.cancel(timeout=600.0)
        with pytest.raises(CallCancelledError):
            plain.get_all_worker_results(references)


def test_cancel_ends_a_stream(plain: RayWorkerGroup, tmp_path: Path) -> None:
    stream = plain.run_single_worker_single_data("stream", 0, started=str(tmp_path / "started"))
    wait_for(tmp_path / "started")
    assert plain.cancel()
    with pytest.raises(CallCancelledError):
        plain.get_all_worker_results([stream])


def test_cancel_without_calls_changes_nothing(plain: RayWorkerGroup) -> None:
    before = call(plain, "num_calls")
    assert plain.cancel()
    assert plain.cancel()
    assert call(plain, "num_calls") == before


def test_method_that_interrupts_itself_leaves_its_worker_usable(plain: RayWorkerGroup) -> None:
    """Ray reports a `KeyboardInterrupt` of a method as a cancelled task."""
    queued = plain.run_all_workers_single_data("interrupt_itself"), plain.run_all_workers_single_data("num_calls")
    with pytest.raises(CallCancelledError):
        plain.get_all_worker_results(queued[0])
    assert len(plain.get_all_worker_results(queued[1])) == 2


def main_thread_functions() -> set[str]:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return {function.f_code.co_name for function, _ in traceback.walk_stack(frame)}


def test_ctrl_c_during_a_call_cancels_it(plain: RayWorkerGroup, tmp_path: Path) -> None:
    started = [tmp_path / str(rank) for rank in range(2)]

    def interrupt() -> None:
        wait_for(*started)
        while "get_all_worker_results" not in main_thread_functions():  # the workers may begin before it
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    references = plain.run_all_workers_multiple_data("block", started=[str(path) for path in started])
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        plain.get_all_worker_results(references)
    thread.join()
    assert len(call(plain, "num_calls")) == 2  # the workers are idle
    with pytest.raises(CallCancelledError):
        plain.get_all_worker_results(references)


def test_cancel_reports_a_call_that_cannot_be_interrupted(
    ray_local: str, sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RayVirtualCluster([1], use_gpus=False) as other:
        (sources / "stubborn_workers.py").write_text(
            "import pathlib, time\n\n\nclass Stubborn:\n    def block(self, started):\n"
            "        while True:\n            try:\n                pathlib.Path(started).touch()\n"
            "                time.sleep(0.1)\n            except KeyboardInterrupt:\n                pass\n"
        )
        with RayWorkerGroup(other, builder(sources, "stubborn_workers.Stubborn")) as group:
            group.run_all_workers_single_data("block", started=str(tmp_path / "started"))
            wait_for(tmp_path / "started")
            assert not group.cancel(timeout=1.0)
            assert "1 of 1 workers could not be interrupted" in caplog.text
            assert group.shutdown(force=True)


def test_cancel_of_coroutines(ray_local: str, sources: Path, tmp_path: Path) -> None:
    with (
        RayVirtualCluster([1], use_gpus=False) as other,
        RayWorkerGroup(other, builder(sources, "Async")) as group,
    ):
        for method in ("block", "stream"):
            references = group.run_all_workers_single_data(method, started=str(tmp_path / method))
            wait_for(tmp_path / method)
            assert group.cancel()
            with pytest.raises(CallCancelledError):
                group.get_all_worker_results(references)
        assert call(group, "num_calls") == [1]


@pytest.mark.slow  # starts a group of its own
def test_cancel_of_more_coroutines_than_may_run(ray_local: str, sources: Path, tmp_path: Path) -> None:
    """Two may run, and one in another concurrency group; the others wait."""
    with (
        RayVirtualCluster([1], use_gpus=False) as other,
        RayWorkerGroup(other, builder(sources, "Narrow")) as group,
    ):
        calls = [group.run_all_workers_single_data("block", started=str(tmp_path / str(n))) for n in range(5)]
        calls.append(group.run_all_workers_single_data("in_other", started=str(tmp_path / "other")))
        wait_for(tmp_path / "0", tmp_path / "1", tmp_path / "other")
        assert group.cancel()
        for references in calls:
            with pytest.raises(CallCancelledError):
                group.get_all_worker_results(references)
        assert call(group, "num_calls") == [3]


# --- `with`, dropped groups, cells that run again -------------------------------------------------------------------


def test_with_ends_the_group(ray_local: str, sources: Path, tmp_path: Path) -> None:
    with RayVirtualCluster([1], use_gpus=False) as other:
        with RayWorkerGroup(other, builder(sources)) as group:
            assert call(group, "num_calls") == [0]
        assert not group.workers
        with pytest.raises(ZeroDivisionError), RayWorkerGroup(other, builder(sources)) as busy:  # noqa: PT012
            busy.run_all_workers_single_data("block", started=str(tmp_path / "started"))
            wait_for(tmp_path / "started")
            _ = 1 / 0
        assert not busy.workers
        with RayWorkerGroup(other, builder(sources)) as third:
            assert call(third, "num_calls") == [0]


@pytest.mark.parametrize("after_error", [False, True])
def test_dropped_group_gives_its_bundles_back(ray_local: str, sources: Path, after_error: bool) -> None:
    """An error that Ray raises refers to its own traceback, and so to the group, until Python collects cycles."""
    with RayVirtualCluster([1], use_gpus=False) as other:
        group = RayWorkerGroup(other, builder(sources))
        gc.disable()
        try:
            if after_error:
                with contextlib.suppress(RuntimeError):
                    call(group, "fail")
        finally:
            gc.enable()
        del group
        with RayWorkerGroup(other, builder(sources)) as following:
            assert call(following, "num_calls") == [0]


def test_group_of_another_name_is_named_as_the_holder(
    ray_local: str, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    with RayVirtualCluster([1], use_gpus=False) as other:
        script.first = RayWorkerGroup(other, builder(sources))
        with pytest.raises(ResourceInsufficientError, match=r"Plain \(held by 'first'\)"):
            RayWorkerGroup(other, builder(sources))
        script.first.shutdown()


@pytest.mark.parametrize("keeps_group", [False, True])
@pytest.mark.slow  # starts groups
def test_cluster_that_another_name_holds_is_named_at_once(
    ray_local: str, sources: Path, monkeypatch: pytest.MonkeyPatch, keeps_group: bool
) -> None:
    """The name of the cluster, or of a group on it. Waiting would end with another message."""
    script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    cluster = RayVirtualCluster([6], use_gpus=False, name="large")
    cluster.bundles()
    if keeps_group:
        script.holder = RayWorkerGroup(cluster, builder(sources), 1)
    else:
        script.holder = cluster
    del cluster
    with pytest.raises(ResourceInsufficientError, match=r"itself holds.*'large'.*\(held by 'holder'\)") as raised:
        RayVirtualCluster([6], use_gpus=False).bundles()
    assert "Gave up" not in str(raised.value)
    script.holder.shutdown()
    del script.holder
    with RayVirtualCluster([6], use_gpus=False) as following:
        assert len(following.bundles()) == 6


@pytest.mark.slow  # starts and stops groups
def test_cell_with_cluster_and_group_runs_again(ray_local: str, sources: Path) -> None:
    """Both need all CPUs that are left. The second group ends the first, which held the first cluster."""
    names: dict[str, Any] = {"Cluster": RayVirtualCluster, "Group": RayWorkerGroup}
    names |= {"build": builder, "sources": sources}
    for _ in range(3):
        run_cell("cluster = Cluster([6], use_gpus=False)", names)
        run_cell("group = Group(cluster, build(sources), 1)", names)
        assert call(names["group"], "num_calls") == [0]
    names["group"].shutdown()
    names["cluster"].shutdown()


def test_cell_that_runs_again_replaces_its_group(ray_local: str, sources: Path, tmp_path: Path) -> None:
    """Both cells also differ, and the first group is in the middle of a call."""
    with RayVirtualCluster([1], use_gpus=False) as other:
        names: dict[str, Any] = {"cluster": other, "build": builder, "Group": RayWorkerGroup, "sources": sources}
        run_cell("group = Group(cluster, build(sources))", names)
        first = names["group"]
        references = first.run_all_workers_single_data("block", started=str(tmp_path / "started"))
        wait_for(tmp_path / "started")
        run_cell("group = Group(cluster, build(sources), name_prefix='second')", names)
        assert call(names["group"], "num_calls") == [0]
        with pytest.raises(WorkerError):
            call(first, "num_calls")
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(references)
        names["group"].shutdown()


@pytest.mark.parametrize(
    "source",
    [
        "for _ in range(2): group = Group(cluster, build(sources))",
        "def start():\n    group = Group(cluster, build(sources))\n    held.append(group)\nstart(); start()",
        "held.append(Group(cluster, build(sources)))\nheld.append(Group(cluster, build(sources)))",
    ],
)
@pytest.mark.slow  # starts groups
def test_one_cell_does_not_replace_its_own_groups(ray_local: str, sources: Path, source: str) -> None:
    with RayVirtualCluster([1], use_gpus=False) as other:
        names: dict[str, Any] = {"cluster": other, "build": builder, "Group": RayWorkerGroup, "sources": sources}
        names["held"] = []
        with pytest.raises(ResourceInsufficientError, match="groups with a worker there: Plain"):
            run_cell(source, names)
        for group in [*names["held"], names.get("group")]:
            if group is not None:
                assert call(group, "num_calls") == [0]
                group.shutdown()


# --- edited classes ----------------------------------------------------------------------------------------------


@pytest.mark.slow  # starts and stops groups
def test_group_of_an_edited_class_runs_the_new_code(ray_local: str, sources: Path) -> None:
    """First the code changes, then a method, a variable of the class, and a module that it imports."""
    module, helper = sources / "changing_workers.py", sources / "changing_helper.py"
    text = (
        "import os\nimport ray\nimport changing_helper\n\n\n"
        "@ray.remote(runtime_env={{'env_vars': {{'CHANGING': '{variable}'}}}})\nclass Changing:\n"
        "    def {method}(self):\n        return {value!r}, os.environ['CHANGING'], changing_helper.VALUE\n"
    )
    helper.write_text("VALUE = 1\n")
    names: dict[str, Any] = {"Group": RayWorkerGroup, "build": builder, "sources": sources}
    versions = [("old", "read", "a"), ("newer", "read", "a"), ("newest", "look", "a"), ("newest", "look", "b")]
    with RayVirtualCluster([1], use_gpus=False) as other:
        names["cluster"] = other
        for value, method, variable in versions:
            module.write_text(text.format(value=value, method=method, variable=variable))
            run_cell("group = Group(cluster, build(sources, 'changing_workers.Changing'))", names)
            assert call(names["group"], method) == [(value, variable, 1)]
        helper.write_text("VALUE = 1000\n")
        run_cell("group = Group(cluster, build(sources, 'changing_workers.Changing'))", names)
        assert call(names["group"], "look") == [("newest", "b", 1000)]
        module.write_text(text.format(value="restarted", method="see", variable="b"))
        assert names["group"].replace_workers([0]) == [0]
        assert call(names["group"], "see") == [("restarted", "b", 1000)]
        names["group"].shutdown()


# --- several venvs -----------------------------------------------------------------------------------------------


@pytest.mark.slow  # starts and stops groups
def test_prepare_venvs_builds_in_parallel(
    ray_local: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each install waits until the other one has started, and fails if that does not happen."""
    wrapper = tmp_path / "uv"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *"pip install"*)\n  touch {tmp_path}/started.$$\n  n=0\n'
        f'  while [ "$(ls {tmp_path} | grep -c started)" -lt 2 ]; do\n'
        f'    n=$((n+1)); [ $n -gt 6000 ] && exit 9; sleep 0.05\n  done;;\nesac\nexec {find_uv()} "$@"\n'
    )
    wrapper.chmod(0o755)
    builders = [builder(sources, uv=[f"packaging=={version}"]) for version in ("24.1", "24.2")]
    monkeypatch.setenv("NEMO_RL_UV", str(wrapper))
    prepare_venvs(builders)
    monkeypatch.setenv("NEMO_RL_UV", str(tmp_path / "no more builds"))
    with RayVirtualCluster([2], use_gpus=False, max_colocated_worker_groups=2) as other:
        for item in builders:
            with RayWorkerGroup(other, item, 1) as group:
                assert call(group, "num_calls") == [0]
