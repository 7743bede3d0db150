"""Plans: digests, and errors that are raised before a build."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, Project, copy_project, make_wheel, run_in, uv

from nemo_rl import venvs
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.errors import IncompatibleVenvError, LockMismatchError, UnknownExtraError, UvNotFoundError, VenvError
from nemo_rl.venvs import DriverVersions, Store, plan


def test_plan_contains_exactly_the_selection(project: Project) -> None:
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


def test_digest_depends_only_on_selected_packages(project: Project) -> None:
    before = {extra: plan(project.command("--extra", extra)).digest for extra in ("one", "two")}
    project.lock(delta="2.0")  # the extra `two`
    after = {extra: plan(project.command("--extra", extra)).digest for extra in ("one", "two")}
    assert after["one"] == before["one"]
    assert after["two"] != before["two"]
    project.lock(delta="1.0")
    assert plan(project.command("--extra", "two")).digest == before["two"]


def test_digest_depends_on_content_of_wheels(project: Project, tmp_path: Path) -> None:
    wheels = tmp_path / "own_wheels"
    make_wheel(wheels, "alpha", "1.0")
    for name in ("beta", "delta", "epsilon", "gamma"):
        make_wheel(wheels, name, "1.0")
    other = Project(project.root, wheels)
    other.lock()
    before = plan(other.command()).digest
    make_wheel(wheels, "alpha", "1.0", num_modules=3)
    assert plan(other.command()).digest != before


def test_digest_depends_on_entry_points_but_not_on_code(project: Project) -> None:
    before = plan(project.command()).digest
    (project.root / "src" / "sample" / "__init__.py").write_text("CODE = 2\n")
    assert plan(project.command()).digest == before
    project.write(extra_text='[project.entry-points."nemo_rl.actor_environments"]\nx = "sample:CODE"\n')
    assert plan(project.command()).digest != before


def test_digest_depends_on_code_of_non_editable_packages(project: Project) -> None:
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

    planned = plan(project.command())
    code.write_text("CODE = 2\n")
    with pytest.raises(LockMismatchError, match="files of copied"):  # as on a node with an older copy
        venvs.ensure(planned, "A", force_rebuild=True)
    second = venvs.ensure(project.command(), "A")
    assert second.digest != first.digest
    assert run_in(second.python, "import copied; print(copied.CODE)") == "2"


def test_two_checkouts_have_two_digests(project: Project, tmp_path: Path) -> None:
    other = copy_project(project, tmp_path / "elsewhere")  # the venv contains a link to the project's code
    assert plan(other.command()).digest != plan(project.command()).digest


def test_warm_plan_runs_no_uv_and_detects_changes(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = plan(project.command()).digest
    with monkeypatch.context() as context:
        context.setenv("NEMO_RL_UV", "/nowhere/uv")
        assert plan(project.command()).digest == digest
        with pytest.raises(UvNotFoundError, match="NEMO_RL_UV"):
            plan(project.command("--extra", "one"))
    project.lock(alpha="2.0")
    assert plan(project.command()).digest != digest


def test_missing_uv_error_names_the_fix(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UvNotFoundError, match="pip install uv"):
        plan(project.command())


def test_stale_lock_is_rejected(project: Project, store: Store) -> None:
    project.write(alpha="2.0")
    for create in (plan, lambda text: venvs.create_local_venv(text, "A")):
        with pytest.raises(LockMismatchError, match="uv lock"):
            create(project.command())
    assert store.digests() == []
    assert plan(project.command().replace("--locked", "--frozen")).requirements[0] == "alpha==1.0"


def test_stale_lock_that_cannot_be_resolved_is_rejected(project: Project) -> None:
    project.write(alpha="9.9")
    with pytest.raises(LockMismatchError, match=r"alpha==9\.9"):
        plan(project.command())


def test_missing_lock_or_project_is_rejected(project: Project, tmp_path: Path) -> None:
    (project.root / "uv.lock").unlink()
    with pytest.raises(LockMismatchError, match="uv lock"):
        plan(project.command())
    with pytest.raises(VenvError, match="does not exist"):
        plan(f"uv run --project {tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VenvError, match=r"pyproject\.toml"):
        plan(f"uv run --project {tmp_path / 'empty'}")


def test_unknown_extra_or_group_lists_the_known_ones(project: Project) -> None:
    with pytest.raises(UnknownExtraError, match=r"no extra 'three'.*Known extras: one, two"):
        plan(project.command("--extra", "three"))
    with pytest.raises(UnknownExtraError, match=r"no group 'docs'.*Known groups: checks"):
        plan(project.command("--group", "docs"))


def test_missing_extra_of_this_package_names_the_command_that_adds_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEMO_RL_PROJECT_ROOT", raising=False)
    monkeypatch.chdir(project.root / "src")
    for member, extra in (("VLLM", "vllm"), ("VLLM_CPU", "vllm-cpu"), ("MCORE", "mcore")):
        with pytest.raises(UnknownExtraError, match=rf"The project {project.root} has no extra '{extra}'") as caught:
            plan(getattr(PY_EXECUTABLES, member))
        assert f'Run `nemo-rl add {extra}` in the project: it adds {extra} = ["nemo-rl[{extra}]"]' in str(caught.value)


def test_python_or_ray_mismatch_is_rejected_before_a_build(project: Project, store: Store) -> None:
    driver = DriverVersions.of_this_process()
    other = DriverVersions("3.11.99", driver.ray)
    with pytest.raises(IncompatibleVenvError, match=rf"{driver.python}.*3\.11\.99"):
        venvs.ensure(project.command(), "A", expected=other)
    make_wheel(project.wheels, "ray", "1.2.3")
    with pytest.raises(IncompatibleVenvError, match=r"ray 1\.2\.3.*ray 2\.0"):
        venvs.ensure(project.command("--with", "ray==1.2.3"), "A", expected=DriverVersions(driver.python, "2.0"))
    assert store.builds("0" * 16) == []
    assert all(not store.builds(digest) for digest in store.digests())


def test_plan_is_built_only_from_the_planned_project(project: Project) -> None:
    planned = plan(project.command("--extra", "one"))
    project.lock(beta="2.0")
    with pytest.raises(LockMismatchError, match="Copy the same"):
        venvs.ensure(planned, "A")
    project.lock(beta="1.0", delta="2.0")  # a change of another extra does not affect this venv
    assert venvs.ensure(pickle.loads(pickle.dumps(planned)), "A").digest == planned.digest


def test_interpreter_is_used_unchanged(store: Store) -> None:
    ready = venvs.ensure(sys.executable, "A")
    assert ready.python == sys.executable
    assert not ready.built
    assert not os.path.lexists(store.root / "A")
    with pytest.raises(VenvError, match="no interpreter"):
        venvs.create_local_venv("/nowhere/bin/python", "A")


def test_python_option_accepts_versions_and_paths(project: Project) -> None:
    version = "{}.{}.{}".format(*sys.version_info)
    base = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    for option in (f"--python={base}", "--python=/nowhere/python"):
        if "nowhere" in option:
            with pytest.raises(VenvError, match="/nowhere/python"):
                plan(project.command(option))
        else:
            assert plan(project.command(option)).python.version == version
            assert plan(project.command(option)).digest == plan(project.command()).digest


def test_python_option_prefers_the_driver(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # uv would find no interpreter
    for version in ("{}", "{}.{}", "{}.{}.{}"):
        command = project.command("--python", version.format(*sys.version_info))
        assert plan(command).digest == plan(project.command()).digest


def test_missing_python_names_the_driver(project: Project) -> None:
    with pytest.raises(IncompatibleVenvError) as caught:
        plan(project.command("--python", "3.99"))
    text = str(caught.value)
    assert "no Python 3.99" in text
    assert f"the driver is {DriverVersions.of_this_process().python}" in text
    assert "pyenv" not in text


@pytest.mark.parametrize(
    ("options", "remedy"), [("--python=3", "omit --python"), ("", "install Python 3.11.99"), (None, "give the path")]
)
def test_remedy_for_another_python_fits_the_request(project: Project, options: str | None, remedy: str) -> None:
    text = sys.executable if options is None else project.command(*filter(None, [options]))
    with pytest.raises(IncompatibleVenvError, match=remedy) as caught:
        venvs.ensure(text, "A", expected=DriverVersions("3.11.99", None))
    assert ("--python" in str(caught.value).partition("Ray refuses")[2]) == (options == "--python=3")
