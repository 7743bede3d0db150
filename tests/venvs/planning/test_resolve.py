"""Plans: what decides a venv's identity, what does not, and what is refused before anything is built."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, Project, copy_project, make_wheel, run_in, uv

from nemo_rl import venvs
from nemo_rl.errors import IncompatibleVenvError, LockMismatchError, UnknownExtraError, UvNotFoundError, VenvError
from nemo_rl.venvs import DriverVersions, Store, plan


def test_a_plan_names_exactly_what_the_selection_asks_for(project: Project) -> None:
    planned = plan(project.command("--extra", "one", "--group", "checks"))
    assert [line.split(" @ ")[0] for line in planned.requirements] == [
        "alpha==1.0",
        "beta==1.0",
        "epsilon==1.0",
        "gamma==2.0",
        "sample",
    ]
    assert all(package.hashes for package in planned.packages if package.local is None)
    assert pickle.loads(pickle.dumps(planned)).digest == planned.digest


def test_all_extras_and_default_groups(project: Project) -> None:
    names = {package.name for package in plan(project.command("--all-extras")).packages}
    assert names == {"alpha", "beta", "gamma", "delta", "sample"}
    text = (project.root / "pyproject.toml").read_text()
    (project.root / "pyproject.toml").write_text(text.replace("default-groups = []", 'default-groups = ["checks"]'))
    uv("lock", "--offline", cwd=project.root)
    assert "epsilon" in {package.name for package in plan(project.command()).packages}
    assert "epsilon" not in {package.name for package in plan(project.command("--no-default-groups")).packages}


def test_only_its_own_packages_decide_a_digest(project: Project) -> None:
    before = {extra: plan(project.command("--extra", extra)).digest for extra in ("one", "two")}
    project.lock(delta="2.0")  # the extra `two`
    after = {extra: plan(project.command("--extra", extra)).digest for extra in ("one", "two")}
    assert after["one"] == before["one"]
    assert after["two"] != before["two"]
    project.lock(delta="1.0")
    assert plan(project.command("--extra", "two")).digest == before["two"]


def test_the_same_version_with_other_bytes_is_another_venv(project: Project, tmp_path: Path) -> None:
    wheels = tmp_path / "own_wheels"
    make_wheel(wheels, "alpha", "1.0")
    for name in ("beta", "delta", "epsilon", "gamma"):
        make_wheel(wheels, name, "1.0")
    own = Project(project.root, wheels)
    own.lock()
    before = plan(own.command()).digest
    make_wheel(wheels, "alpha", "1.0", num_modules=3)
    assert plan(own.command()).digest != before


def test_editing_code_changes_nothing_but_an_entry_point_does(project: Project) -> None:
    before = plan(project.command()).digest
    (project.root / "src" / "sample" / "__init__.py").write_text("CODE = 2\n")
    assert plan(project.command()).digest == before
    project.write(extra_text='[project.entry-points."nemo_rl.actor_environments"]\nx = "sample:CODE"\n')
    assert plan(project.command()).digest != before


def test_a_package_that_is_copied_in_counts_with_its_code(project: Project) -> None:
    library = project.root / "libs" / "copied"
    (library / "src" / "copied").mkdir(parents=True)
    code = library / "src" / "copied" / "__init__.py"
    code.write_text("CODE = 1\n")
    (library / "pyproject.toml").write_text('[project]\nname = "copied"\nversion = "1"\n' + BUILD_SYSTEM)
    text = (project.root / "pyproject.toml").read_text().replace('["alpha==1.0"]', '["alpha==1.0", "copied"]')
    (project.root / "pyproject.toml").write_text(text + '[tool.uv.sources]\ncopied = { path = "libs/copied" }\n')
    uv("lock", "--offline", cwd=project.root)
    first = venvs.ensure(project.command(), "A")
    assert run_in(first.python, "import copied; print(copied.CODE)") == "1"

    code.write_text("CODE = 2\n")
    second = venvs.ensure(project.command(), "A")
    assert second.digest != first.digest
    assert run_in(second.python, "import copied; print(copied.CODE)") == "2"


def test_two_checkouts_are_two_venvs(project: Project, tmp_path: Path) -> None:
    other = copy_project(project, tmp_path / "elsewhere")  # the venv holds a link to the project's own code
    assert plan(other.command()).digest != plan(project.command()).digest


def test_a_warm_plan_calls_no_uv_and_sees_every_change(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = plan(project.command()).digest
    with monkeypatch.context() as context:
        context.setenv("NEMO_RL_UV", "/nowhere/uv")
        assert plan(project.command()).digest == digest
        with pytest.raises(UvNotFoundError, match="NEMO_RL_UV"):
            plan(project.command("--extra", "one"))
    project.lock(alpha="2.0")
    assert plan(project.command()).digest != digest


def test_without_uv_the_error_says_how_to_get_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UvNotFoundError, match="pip install uv"):
        plan(project.command())


def test_a_lock_that_does_not_match_is_refused(project: Project, store: Store) -> None:
    project.write(alpha="2.0")
    for create in (plan, lambda text: venvs.create_local_venv(text, "A")):
        with pytest.raises(LockMismatchError, match="uv lock"):
            create(project.command())
    assert store.digests() == []
    assert plan(project.command().replace("--locked", "--frozen")).requirements[0] == "alpha==1.0"


def test_a_lock_that_neither_matches_nor_can_be_made_again(project: Project) -> None:
    project.write(alpha="9.9")
    with pytest.raises(LockMismatchError, match=r"alpha==9\.9"):
        plan(project.command())


def test_a_missing_lock_or_project_is_refused(project: Project, tmp_path: Path) -> None:
    (project.root / "uv.lock").unlink()
    with pytest.raises(LockMismatchError, match="uv lock"):
        plan(project.command())
    with pytest.raises(VenvError, match="does not exist"):
        plan(f"uv run --project {tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VenvError, match=r"pyproject\.toml"):
        plan(f"uv run --project {tmp_path / 'empty'}")


def test_an_unknown_extra_or_group_names_the_known_ones(project: Project) -> None:
    with pytest.raises(UnknownExtraError, match=r"no extra 'three'.*Known extras: one, two"):
        plan(project.command("--extra", "three"))
    with pytest.raises(UnknownExtraError, match=r"no group 'docs'.*Known groups: checks"):
        plan(project.command("--group", "docs"))


def test_another_python_or_ray_than_the_drivers_is_refused_before_building(project: Project, store: Store) -> None:
    driver = DriverVersions.of_this_process()
    other = DriverVersions("3.11.99", driver.ray)
    with pytest.raises(IncompatibleVenvError, match=rf"{driver.python}.*3\.11\.99"):
        venvs.ensure(project.command(), "A", expected=other)
    make_wheel(project.wheels, "ray", "1.2.3")
    with pytest.raises(IncompatibleVenvError, match=r"ray 1\.2\.3.*ray 2\.0"):
        venvs.ensure(project.command("--with", "ray==1.2.3"), "A", expected=DriverVersions(driver.python, "2.0"))
    assert store.builds("0" * 16) == []
    assert all(not store.builds(digest) for digest in store.digests())


def test_a_plan_of_another_node_is_built_here_only_from_the_same_project(project: Project) -> None:
    planned = plan(project.command("--extra", "one"))
    project.lock(beta="2.0")
    with pytest.raises(LockMismatchError, match="Bring the same"):
        venvs.ensure(planned, "A")
    project.lock(beta="1.0", delta="2.0")  # another extra: this venv is the same
    assert venvs.ensure(pickle.loads(pickle.dumps(planned)), "A").digest == planned.digest


def test_an_interpreter_is_used_as_it_is(store: Store) -> None:
    ready = venvs.ensure(sys.executable, "A")
    assert ready.python == sys.executable
    assert not ready.built
    assert not os.path.lexists(store.root / "A")
    with pytest.raises(VenvError, match="no interpreter"):
        venvs.create_local_venv("/nowhere/bin/python", "A")


def test_the_python_option_takes_versions_and_paths(project: Project) -> None:
    version = "{}.{}.{}".format(*sys.version_info)
    base = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    for option in (f"--python={base}", "--python=/nowhere/python"):
        if "nowhere" in option:
            with pytest.raises(VenvError, match="/nowhere/python"):
                plan(project.command(option))
        else:
            assert plan(project.command(option)).python.version == version
            assert plan(project.command(option)).digest == plan(project.command()).digest
