"""The lock as a graph, against `uv export` as the independent reference."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from sample_projects import Project

from nemo_rl.errors import LockMismatchError
from nemo_rl.venvs.interpreter import this_environment
from nemo_rl.venvs.lock_graph import LockGraph, Selection
from nemo_rl.venvs.uv import find_uv, uv_environment

ROOT = Path(__file__).resolve().parents[2]


def selection(*extras: str, groups: tuple[str, ...] = ()) -> Selection:
    return Selection(frozenset(extras), frozenset(groups), this_environment())


def exported(root: Path, chosen: Selection) -> set[tuple[str, str | None]]:
    options = [word for extra in chosen.extras for word in ("--extra", extra)]
    options += [word for group in chosen.groups for word in ("--group", group)]
    command = [find_uv(), "export", "--frozen", "--no-default-groups", "--format", "pylock.toml", *options]
    done = subprocess.run(command, cwd=root, env=uv_environment(), capture_output=True, text=True, check=True)
    return {
        (entry["name"], entry.get("version"))
        for entry in tomllib.loads(done.stdout)["packages"]
        if "directory" not in entry and ("marker" not in entry or Marker(entry["marker"]).evaluate(this_environment()))
    }


@pytest.mark.parametrize(
    "chosen",
    [
        selection(),
        selection("vllm"),
        selection("vllm-cpu"),
        selection("mcore"),
        selection("wandb", "mlflow"),
        selection("vllm", groups=("test",)),
        selection(groups=("dev", "docs")),
    ],
    ids=lambda chosen: "+".join(sorted(chosen.extras | chosen.groups)) or "base",
)
def test_reaches_exactly_what_uv_exports_from_this_projects_lock(chosen: Selection) -> None:
    graph = LockGraph.read(ROOT, ROOT)
    reached = {(package.name, package.version) for package in graph.walk(chosen).paths}
    assert reached == exported(ROOT, chosen)


def test_paths_say_where_a_package_comes_from(project: Project) -> None:
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
    assert walk.dependents[epsilon] == {graph.project}
    assert walk.find("delta") is None


def test_the_projects_own_demands_follow_the_selection(project: Project) -> None:
    graph = LockGraph.read(project.root, project.root)
    assert graph.asked_for("alpha", selection()) == ["alpha==1.0"]
    assert graph.asked_for("beta", selection()) == []
    assert graph.asked_for("beta", selection("one")) == ["beta==1.0"]
    assert graph.asked_for("epsilon", selection(groups=("checks",))) == ["epsilon"]


def test_overrides_are_known() -> None:
    graph = LockGraph.read(ROOT, ROOT)
    assert graph.overrides("Torch") == ["torch==2.13.0"]
    assert graph.overrides("numpy") == []


@pytest.mark.parametrize("text", ["not toml [", "[[package]]\nversion = '1'\n"])
def test_a_broken_lock_is_one_typed_error(project: Project, text: str) -> None:
    (project.root / "uv.lock").write_text(text)
    with pytest.raises(LockMismatchError, match=r"uv.lock cannot be read.*Run `uv lock`"):
        LockGraph.read(project.root, project.root)


def test_a_lock_without_the_project_is_refused(project: Project, tmp_path: Path) -> None:
    with pytest.raises(LockMismatchError, match="does not hold the project"):
        LockGraph.read(project.root, tmp_path)
