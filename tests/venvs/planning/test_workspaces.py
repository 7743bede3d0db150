"""Workspaces: which lock counts, and errors that name members. `test_equals_uv_sync.py` compares the packages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, uv, write_files

from nemo_rl import venvs
from nemo_rl.errors import LockMismatchError, UnknownExtraError, VenvError
from nemo_rl.venvs import plan
from nemo_rl.venvs.explain import explain

ROOT = '[tool.uv.workspace]\nmembers = ["one", "two"]\n[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n'


def member(name: str, dependency: str) -> dict[str, str]:
    text = f'[project]\nname = "{name}"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["{dependency}"]\n'
    text += (
        f'[project.optional-dependencies]\n{name}-extra = ["beta"]\nboth = []\n[dependency-groups]\n{name}-group = []\n'
    )
    return {f"{name}/pyproject.toml": text + BUILD_SYSTEM, f"{name}/src/{name}/__init__.py": ""}


@pytest.fixture
def workspace(tmp_path: Path, project_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "ws"
    files = {"pyproject.toml": ROOT, **member("one", "alpha==1.0"), **member("two", "alpha<2")}
    write_files(root, files, wheels=str(project_template))
    uv("lock", cwd=root)
    monkeypatch.chdir(root)
    return root


def test_stale_lock_of_a_member_is_ignored(workspace: Path) -> None:
    shutil.copy("uv.lock", "one")
    command = "uv run --locked --project one"
    assert plan(command).requirements[0] == "alpha==1.0"  # resolved, but not built
    write_files(workspace, {**member("one", "alpha==2.0"), **member("two", "alpha")})
    uv("lock", cwd=workspace)
    venv = venvs.ensure(command, "A")
    assert venv.manifest is not None
    assert venv.manifest.packages[0] == "alpha==2.0"
    assert plan(command).lock_root == str(workspace)


def test_change_of_another_member_needs_a_new_lock(workspace: Path) -> None:
    plan("uv run --project one")
    write_files(workspace, member("two", "alpha>=2"))
    with pytest.raises(LockMismatchError, match="uv lock"):
        plan("uv run --project one")
    (workspace / "uv.lock").unlink()
    with pytest.raises(LockMismatchError, match=rf"{workspace} has no uv\.lock. Run `uv lock` there"):
        plan("uv run --project one")


def test_new_member_needs_a_new_lock(workspace: Path, project_template: Path) -> None:
    write_files(workspace, {"pyproject.toml": ROOT.replace('"two"', '"t*"')}, wheels=str(project_template))
    command = "uv run --project . --all-packages"
    before = plan(command).digest
    write_files(workspace, member("three", "alpha"))
    with pytest.raises(LockMismatchError, match="uv lock"):
        plan(command)
    uv("lock", cwd=workspace)
    assert plan(command).digest != before


def test_paths_stay_below_a_link(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    link = tmp_path / "deep" / "link"
    link.symlink_to(workspace)
    planned = plan(f"uv run --project {link}/one --all-packages")
    assert [package.location for package in planned.packages if package.local] == [f"{link}/one", f"{link}/two"]
    assert planned.lock_root == str(link)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--project one --extra x",
            r"no extra 'x'. Known extras: both \(one\), one-extra \(one\), both \(two\), two-extra",
        ),
        ("--project . --extra x", "no extra 'x'. Known extras: both"),
        (
            "--project one --group two-group",
            r"no group 'two-group'. Known groups: one-group \(one\), two-group \(two\)",
        ),
        ("--project one --package three", "no package 'three'. Known packages: one, two"),
    ],
)
@pytest.mark.parametrize("mode", ["--locked", "--frozen"])
def test_unknown_names_list_those_of_the_members(workspace: Path, options: str, message: str, mode: str) -> None:
    with pytest.raises(UnknownExtraError, match=message):
        plan(f"uv run {mode} {options}")


def test_members_that_conflict_are_named(workspace: Path, project_template: Path) -> None:
    conflicts = 'conflicts = [[{ package = "one" }, { package = "two" }]]\n'
    write_files(workspace, {"pyproject.toml": ROOT + conflicts}, wheels=str(project_template))
    uv("lock", cwd=workspace)
    with pytest.raises(VenvError, match="selects too much: Package `one` and package `two` are incompatible"):
        plan("uv run --project . --all-packages")


def test_explanation_of_members(workspace: Path) -> None:
    def origins(options: str) -> set[str]:
        return {str(route) for route in explain("A", plan(f"uv run {options}"), "alpha").routes}

    assert origins("--project one") == {"the project's dependencies -> alpha 1.0"}
    assert origins("--project one --package two") == {"the project's dependencies -> alpha 1.0"}
    both = {"the dependencies of one -> alpha 1.0", "the dependencies of two -> alpha 1.0"}
    assert origins("--project .") == origins("--project one --all-packages") == both
    explanation = explain("A", plan("uv run --project . --extra two-extra"), "gamma")
    assert [str(route) for route in explanation.routes] == ["extra two-extra of two -> beta 2.0 -> gamma 2.0"]
    assert explain("A", plan("uv run --project two"), "alpha").demands[0].requirement == "alpha<2"
