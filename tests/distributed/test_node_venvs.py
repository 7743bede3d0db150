"""Venvs on every node: real uv and Ray, with simulated nodes that share one venv directory or have one each."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from nemo_rl import venvs
from nemo_rl.distributed import node_venvs
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.node_venvs import (
    NodeProgress,
    create_local_venv_on_each_node,
    ensure_venv_on_node,
    ensure_venvs_on_each_node,
)
from nemo_rl.distributed.provisioning import coordinator, node_task
from nemo_rl.distributed.provisioning.node_task import Request
from nemo_rl.errors import ClusterError, NodeVenvError, UnknownExtraError, VenvBuildError, VenvError
from nemo_rl.venvs.uv import find_uv

_PYPROJECT = """
[project]
name = "tiny"
version = "0.1"
requires-python = ">=3.11"
dependencies = ["six==1.17.0"]
[project.optional-dependencies]
one = ["iniconfig==2.1.0"]
two = ["packaging==24.2"]
[tool.uv]
package = false
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("project")
    (root / "pyproject.toml").write_text(_PYPROJECT)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "UV_PYTHON")}
    subprocess.run([find_uv(), "lock", "--quiet", "--python", sys.executable], cwd=root, check=True, env=environment)
    return f"uv run --locked --project {root}"


@pytest.fixture(scope="module")
def node_dirs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The venv directories of nodes 1 and 2; node 0 is the driver's."""
    return [tmp_path_factory.mktemp("node") / "venvs" for _ in range(2)]


@pytest.fixture(scope="module")
def cluster(start_nodes: Callable[..., Cluster], node_dirs: list[Path]) -> Cluster:
    return start_nodes(
        {"num_cpus": 2}, *({"num_cpus": 1, "env_vars": {"NEMO_RL_VENV_DIR": str(path)}} for path in node_dirs)
    )


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, node_dirs: list[Path], cluster: Cluster) -> Iterator[None]:
    for name in ("NRL_FORCE_REBUILD_VENVS", "UV_PYTHON", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEMO_RL_COMPILE_BYTECODE", "0")
    node_venvs._ready.clear()
    yield
    for path in node_dirs:
        if path.is_file():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def shared_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One venv directory for all nodes, as on a shared filesystem."""
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "shared"))
    return tmp_path / "shared"


@pytest.fixture
def separate_dirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node_dirs: list[Path]) -> list[Path]:
    """One venv directory per node: the driver does not set the variable, so each node's setting applies."""
    monkeypatch.delenv("NEMO_RL_VENV_DIR", raising=False)
    monkeypatch.setenv("NEMO_RL_PROJECT_ROOT", str(tmp_path))  # the driver's default is in the project
    return [tmp_path / "venvs", *node_dirs]


@pytest.fixture
def no_tasks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which no task may be submitted to another node."""

    def forbid(*arguments: Any) -> None:
        raise AssertionError("a task was submitted to a node")

    return lambda: monkeypatch.setattr(coordinator.ProvisioningCoordinator, "_submit", forbid)


def _versions(python: str, *packages: str) -> list[str]:
    code = f"import importlib.metadata as m; print(*[m.version(p) for p in {packages!r}])"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def _seals(*directories: Path) -> list[Path]:
    return [path for directory in directories for path in directory.glob(".store/*.*/nemo_rl_venv.json")]


def test_nodes_with_a_shared_directory_build_once(project: str, shared_dir: Path, no_tasks: Callable[[], None]) -> None:
    events: list[NodeProgress] = []
    report = ensure_venvs_on_each_node({"a.Worker": project}, progress=events.append)
    assert len(report.entries) == 3
    assert sum(entry.built for entry in report.entries) == 1
    assert report.agrees("a.Worker")
    assert report.python("a.Worker") == str(shared_dir / ".store" / report.digest("a.Worker")[:16] / "bin" / "python")
    assert _versions(report.python("a.Worker"), "six") == ["1.17.0"]
    assert len(_seals(shared_dir)) == 1
    builder = next(entry for entry in report.entries if entry.built)
    assert {event.event.phase for event in events if event.node_id == builder.node_id} >= {
        "fetch",
        "link",
        "check",
        "seal",
    }
    assert builder.seconds.keys() >= {"fetch", "link", "check"}

    no_tasks()
    again = ensure_venvs_on_each_node({"a.Worker": project})
    assert again.python("a.Worker") == report.python("a.Worker")
    assert not any(entry.built for entry in again.entries)
    assert len(again.entries) == 3


def test_nodes_with_a_shared_directory_wait_for_the_builder(
    project: str, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv waits until both other nodes wait for the builder."""
    go = tmp_path / "go"
    monkeypatch.setenv("NEMO_RL_UV", str(_uv_wrapper(tmp_path, f"while [ ! -e {go} ]; do sleep 0.02; done")))
    waiting: set[str] = set()

    def release_when_all_wait(event: NodeProgress) -> None:
        if event.event.phase == "wait":
            assert "which has the same venv directory" in event.event.detail
            waiting.add(event.node_id)
            if len(waiting) == 2:
                go.touch()

    report = ensure_venvs_on_each_node({"a.Worker": project}, progress=release_when_all_wait)
    assert [entry.built for entry in report.entries] == [True, False, False]
    assert waiting == {entry.node_id for entry in report.entries if not entry.built}
    assert len(_seals(shared_dir)) == 1


def test_separate_directories_are_built_separately(
    project: str, separate_dirs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_RL_VENV_SPREAD", "off")
    report = ensure_venvs_on_each_node({"a.Worker": project})
    assert [entry.built for entry in report.entries] == [True, True, True]
    assert {entry.python for entry in report.entries} == {
        str(directory / "a.Worker" / "bin" / "python") for directory in separate_dirs
    }
    for entry in report.entries:
        assert _versions(entry.python, "six") == ["1.17.0"]
        assert report.python("a.Worker", entry.node_id) == entry.stable_python
    assert len({entry.digest for entry in report.entries}) == 1
    assert not report.agrees("a.Worker")
    with pytest.raises(NodeVenvError, match="NEMO_RL_VENV_DIR"):
        report.python("a.Worker")


def test_create_local_venv_on_each_node_returns_the_named_path(project: str, shared_dir: Path) -> None:
    python = create_local_venv_on_each_node(f"{project} --extra one", "my.Worker")
    assert python == str(shared_dir / "my.Worker" / "bin" / "python")
    assert _versions(python, "six", "iniconfig") == ["1.17.0", "2.1.0"]
    assert create_local_venv_on_each_node(sys.executable, "plain.Worker") == sys.executable


def test_equal_contents_are_built_once(project: str, shared_dir: Path) -> None:
    wanted = {
        "base.A": project,
        "base.B": project,
        "one.A": f"{project} --extra one",
        "two.A": f"{project} --extra two",
        "system.A": sys.executable,
    }
    report = ensure_venvs_on_each_node(wanted)
    assert [entry.venv for entry in report.entries] == [*wanted] * 3
    built = Counter(entry.digest for entry in report.entries if entry.built)
    assert built == {report.digest(name): 1 for name in ("base.A", "one.A", "two.A")}
    assert report.python("system.A") == sys.executable
    assert report.python("base.A") == report.python("base.B")
    assert (shared_dir / "base.B" / "bin" / "python").exists()
    assert len(_seals(shared_dir)) == 3


def test_failed_node_is_named_and_the_others_are_ready(project: str, separate_dirs: list[Path]) -> None:
    broken = separate_dirs[2]
    broken.write_text("a file where a directory should be")
    node = next(node for node in ray.nodes() if _node_venv_dir(node["NodeID"]) == str(broken))
    with pytest.raises(NodeVenvError) as caught:
        ensure_venvs_on_each_node({"a.Worker": project, "sys.Worker": sys.executable})
    message = str(caught.value)
    assert f"- a.Worker on {node['NodeManagerAddress']}" in message
    assert str(broken) in message
    assert "The others:" in message
    assert re.search(r"a\.Worker on .* in .* s: built", message)
    assert re.search(r"a\.Worker on .* in .* s: received", message)
    assert isinstance(caught.value.__cause__, VenvError)
    broken.unlink()
    report = ensure_venvs_on_each_node({"a.Worker": project})
    assert [bool(entry.received_from) for entry in report.entries].count(True) == 1
    assert _versions(str(broken / "a.Worker" / "bin" / "python"), "six") == ["1.17.0"]


def _node_venv_dir(node_id: str) -> str:
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)

    @ray.remote(num_cpus=0, scheduling_strategy=strategy)
    def read() -> str:
        return os.environ.get("NEMO_RL_VENV_DIR", "")

    return ray.get(read.remote())


def test_failed_build_is_reported_once_for_a_shared_directory(
    project: str, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venvs.plan(project)  # resolved, so that only the build calls uv
    monkeypatch.setenv("NEMO_RL_UV", str(_uv_wrapper(tmp_path, "echo no luck >&2; exit 7")))
    with pytest.raises(NodeVenvError) as caught:
        ensure_venvs_on_each_node({"a.Worker": project})
    assert isinstance(caught.value.__cause__, VenvBuildError)
    assert str(caught.value).count("no luck") == 1
    assert "same venv directory" in str(caught.value)


def _uv_wrapper(directory: Path, on_sync: str) -> Path:
    path = directory / "uv-wrapper"
    path.write_text(f'#!/bin/sh\nif [ "$1" = sync ]; then\n{on_sync}\nfi\nexec {find_uv()} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_nothing_is_built_when_a_venv_cannot_be_planned(project: str, shared_dir: Path) -> None:
    with pytest.raises(UnknownExtraError, match="three"):
        ensure_venvs_on_each_node({"a.Worker": project, "b.Worker": f"{project} --extra three"})
    assert not _seals(shared_dir)


@pytest.mark.slow  # starts nodes
def test_ensure_venv_on_node_that_joined_later(project: str, cluster: Cluster, shared_dir: Path) -> None:
    ensure_venvs_on_each_node({"a.Worker": project})
    before = {node.node_id for node in alive_nodes()}
    node = cluster.add_node(num_cpus=1)
    try:
        (joined,) = {node.node_id for node in alive_nodes()} - before
        entry = ensure_venv_on_node(joined, project, "a.Worker")
        assert (entry.node_id, entry.built) == (joined, False)
        assert entry.python == str(shared_dir / "a.Worker" / "bin" / "python")
        report = ensure_venvs_on_each_node({"a.Worker": project})
        assert {entry.node_id for entry in report.entries} == before | {joined}
    finally:
        cluster.remove_node(node)
    with pytest.raises(ClusterError, match="not alive"):
        ensure_venv_on_node(joined, project, "a.Worker")


@pytest.mark.slow  # starts nodes
def test_node_without_cpus_and_gpus_is_skipped(project: str, cluster: Cluster, shared_dir: Path) -> None:
    node = cluster.add_node(num_cpus=0)
    try:
        assert len(ensure_venvs_on_each_node({"a.Worker": project}).entries) == 3
    finally:
        cluster.remove_node(node)


@pytest.mark.slow  # builds a venv for each node, three times
def test_force_rebuilds_once_per_job_and_directory(
    project: str, separate_dirs: list[Path], monkeypatch: pytest.MonkeyPatch, no_tasks: Callable[[], None]
) -> None:
    ensure_venvs_on_each_node({"a.Worker": project})
    before = {os.path.realpath(entry / "a.Worker") for entry in separate_dirs}
    monkeypatch.setenv("NRL_FORCE_REBUILD_VENVS", "true")
    node_venvs._ready.clear()  # as in a new driver
    monkeypatch.setattr(node_venvs, "job_name", lambda: "the next job")
    report = ensure_venvs_on_each_node({"a.Worker": project, "b.Worker": project})
    assert [entry.built for entry in report.entries].count(True) == 1
    assert [bool(entry.received_from) for entry in report.entries].count(True) == 2
    after = {os.path.realpath(entry / "a.Worker") for entry in separate_dirs}
    assert before.isdisjoint(after)
    no_tasks()
    again = ensure_venvs_on_each_node({"a.Worker": project, "b.Worker": project})
    assert not any(entry.built for entry in again.entries)
    assert {os.path.realpath(entry / "a.Worker") for entry in separate_dirs} == after


@pytest.mark.slow  # starts and kills nodes
def test_another_node_builds_when_the_builder_is_lost(
    project: str, cluster: Cluster, separate_dirs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Add two nodes with a shared directory, and remove the one that builds during its build."""
    monkeypatch.setenv("NEMO_RL_VENV_SPREAD", "off")
    hangs_once = _uv_wrapper(tmp_path, f"if mkdir {tmp_path}/hung 2>/dev/null; then sleep 600; fi")
    variables = {"NEMO_RL_VENV_DIR": str(tmp_path / "pair"), "NEMO_RL_UV": str(hangs_once)}
    pair = {node.node_id: node for node in (cluster.add_node(num_cpus=1, env_vars=variables) for _ in range(2))}
    removed: list[str] = []

    def remove_the_builder(event: NodeProgress) -> None:
        if event.node_id in pair and event.event.phase == "fetch" and not removed:
            removed.append(event.node_id)
            # Before its call of uv hangs, the other node's would.
            deadline = time.monotonic() + 120
            while not (tmp_path / "hung").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            cluster.remove_node(pair.pop(event.node_id), allow_graceful=False)

    try:
        report = ensure_venvs_on_each_node({"a.Worker": project}, progress=remove_the_builder)
        (survivor,) = pair
        assert removed
        (entry,) = [entry for entry in report.entries if entry.node_id == survivor]
        assert entry.built
        assert removed[0] not in {entry.node_id for entry in report.entries}
    finally:
        for node in pair.values():
            cluster.remove_node(node)


def test_missing_interpreter_is_an_error_of_the_node(tmp_path: Path, shared_dir: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    plan = venvs.plan(str(python))
    present = node_task.survey(Request("id", "10.0.0.1", {}, "job"), {"w": plan})
    assert present.done[0].error is None
    python.unlink()
    absent = node_task.survey(Request("id", "10.0.0.1", {}, "job"), {"w": plan})
    assert str(python) in str(absent.done[0].error)
    assert absent.missing == ()


def test_node_variables_prefer_the_nodes_uv_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_CACHE_DIR", "the node's")
    monkeypatch.setenv("NEMO_RL_VENV_DIR", "the node's")
    monkeypatch.delenv("UV_OFFLINE", raising=False)
    received = {"UV_CACHE_DIR": "the driver's", "UV_OFFLINE": "1", "NEMO_RL_VENV_DIR": "the driver's"}
    assert node_task.node_variables(received) == {"UV_OFFLINE": "1", "NEMO_RL_VENV_DIR": "the driver's"}
