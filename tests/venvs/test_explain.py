"""`explain` and `difference` on real locks with conflicting extras."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, Project, make_wheel, uv

from nemo_rl.venvs import create_local_venv, ensure, parse_py_executable, plan
from nemo_rl.venvs.explain import Explanation, difference, explain, to_json


@pytest.fixture
def forked(tmp_path: Path) -> Project:
    """Extras `old` (whose tool needs alpha<2) and `new` (alpha 2.0) conflict, so the lock holds two alphas."""
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "alpha", "1.0")
    make_wheel(wheels, "alpha", "2.0")
    make_wheel(wheels, "tool", "3.1", requires=("alpha<2",))
    project = Project(tmp_path / "forked", wheels)
    (project.root / "src" / "forked").mkdir(parents=True)
    (project.root / "src" / "forked" / "__init__.py").touch()
    (project.root / "pyproject.toml").write_text(
        f"""
        [project]
        name = "forked"
        version = "0.1"
        requires-python = ">=3.11"
        dependencies = ["alpha"]
        [project.optional-dependencies]
        old = ["tool"]
        new = ["alpha==2.0"]
        [tool.uv]
        default-groups = []
        conflicts = [[{{ extra = "old" }}, {{ extra = "new" }}]]
        no-index = true
        find-links = ["{wheels}"]
        """.replace("\n        ", "\n")
        + BUILD_SYSTEM
    )
    uv("lock", "--offline", cwd=project.root)
    return project


def explained(worker: str, py_executable: str, package: str) -> Explanation:
    return explain(worker, plan(py_executable), package)


def test_forks_explain_their_versions(forked: Project) -> None:
    old = explained("Old", forked.command("--extra old"), "ALPHA")
    new = explained("New", forked.command("--extra new"), "alpha")
    assert (old.package, old.version, old.source) == ("alpha", "1.0", "lock")
    assert new.version == "2.0"
    assert [str(route) for route in old.routes] == [
        "the project's dependencies -> alpha 1.0",
        "extra old -> tool 3.1 -> alpha 1.0",
    ]
    assert [str(demand) for demand in new.demands] == ["forked 0.1 (alpha==2.0)", "forked 0.1 (alpha)"]
    assert set(old.locked_versions) == {"1.0", "2.0"}
    sentence = difference(old, new)
    assert sentence is not None
    assert "Old selects extra old and New extra new" in sentence
    assert "extra new / extra old are declared as conflicting" in sentence


def test_built_venv_names_the_excluding_requirement(forked: Project) -> None:
    before = explained("Old", forked.command("--extra old"), "alpha")
    assert {demand.requirement for demand in before.demands if demand.by == "tool 3.1"} == {None}
    create_local_venv(forked.command("--extra old"), "Old")
    old, new = (explained(name, forked.command(f"--extra {name.lower()}"), "alpha") for name in ("Old", "New"))
    assert {demand.requirement for demand in old.demands if demand.by == "tool 3.1"} == {"alpha<2"}
    sentence = difference(old, new)
    assert sentence is not None
    assert "Old cannot have 2.0: tool 3.1 (alpha<2) excludes it" in sentence


def test_equal_versions_do_not_differ(forked: Project) -> None:
    base, new = (
        explained(name, forked.command(*options), "alpha") for name, options in (("A", ()), ("B", ("--extra new",)))
    )
    assert base.version == new.version == "2.0"
    assert difference(base, new) is None


def test_absent_package(forked: Project) -> None:
    base, old = (
        explained(name, forked.command(*options), "tool") for name, options in (("A", ()), ("B", ("--extra old",)))
    )
    assert (base.version, base.source, base.routes, base.demands) == (None, None, (), ())
    sentence = difference(base, old)
    assert sentence is not None
    assert "no package that A selects (the project's dependencies) depends on tool" in sentence
    assert "B gets 3.1 through extra old -> tool 3.1" in sentence


def test_added_package_replaces_the_locked_one(forked: Project) -> None:
    spec = parse_py_executable(forked.command()).with_packages([str(forked.wheels / "alpha-1.0-py3-none-any.whl")])
    ensure(spec, "Added")
    added, base = explain("Added", plan(spec), "alpha"), explained("Base", forked.command(), "alpha")
    assert added.source == "added"
    assert added.replaced == "2.0"
    assert explain("Added", plan(spec), "tool").version is None
    sentence = difference(added, base)
    assert sentence is not None
    assert "Added has 1.0 from a list of added requirements instead of 2.0 from its base venv" in sentence


def test_interpreter_has_its_installed_packages(forked: Project) -> None:
    python = explained("System", sys.executable, "packaging")
    assert python.source == "interpreter"
    assert python.version is not None
    assert any(demand.by.startswith("pytest ") for demand in python.demands)
    sentence = difference(explained("System", sys.executable, "alpha"), explained("Base", forked.command(), "alpha"))
    assert sentence is not None
    assert "does not have alpha, Base gets 2.0 through the project's dependencies -> alpha 2.0" in sentence


def test_default_groups_count(project: Project) -> None:
    text = (project.root / "pyproject.toml").read_text()
    (project.root / "pyproject.toml").write_text(text.replace("default-groups = []", 'default-groups = ["checks"]'))
    uv("lock", "--offline", cwd=project.root)
    assert [str(route) for route in explained("A", project.command(), "epsilon").routes] == [
        "group checks -> epsilon 1.0"
    ]
    assert explained("A", project.command("--no-default-groups"), "epsilon").version is None


def test_to_json_is_plain_data(forked: Project) -> None:
    plain = to_json(explained("Old", forked.command("--extra old"), "alpha"))
    assert plain["version"] == "1.0"
    assert plain["routes"][1] == {"origin": "extra old", "packages": ["tool 3.1", "alpha 1.0"]}
    assert {"by": "tool 3.1", "requirement": None} in plain["demands"]
