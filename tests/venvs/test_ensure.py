"""`ensure`: identity, sharing, sealing, rebuilding and isolation of venvs."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, Project, run_in, uv

from nemo_rl import venvs
from nemo_rl.errors import IncompatibleVenvError, VenvBuildError, VenvError
from nemo_rl.venvs import DriverVersions, Progress, Store

HOSTILE = ("UV_PYTHON", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "PYTHONPATH", "PYTHONHOME", "CONDA_PREFIX")


def test_create_local_venv_returns_the_named_interpreter(project: Project, store: Store) -> None:
    python = venvs.create_local_venv(project.command("--extra", "one"), "some.module.Worker")

    assert python == str(store.root / "some.module.Worker" / "bin" / "python")
    assert run_in(python, "import alpha, beta, gamma; print(alpha.VERSION, beta.VERSION)") == "1.0 1.0"
    find = "import importlib.util as u; print(u.find_spec('delta'), u.find_spec('epsilon'))"
    assert run_in(python, find) == "None None"


def test_default_venv_dir_is_in_the_project_root(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMO_RL_VENV_DIR")
    monkeypatch.setenv("NEMO_RL_PROJECT_ROOT", str(project.root))
    python = venvs.create_local_venv("uv run --extra one", "W")  # the default project
    assert python == str(project.root / "venvs" / "W" / "bin" / "python")
    assert (project.root / "venvs" / ".gitignore").read_text().endswith("*\n")


def test_warm_call_builds_nothing_and_runs_no_uv(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    first = venvs.ensure(project.command(), "A")
    monkeypatch.setenv("NEMO_RL_UV", "/nowhere/uv")
    second = venvs.ensure(project.command(), "A")

    assert first.built
    assert not second.built
    assert (second.python, second.path, second.digest) == (first.python, first.path, first.digest)
    assert pickle.loads(pickle.dumps(second)) == second


def test_equal_digests_share_one_venv(project: Project, store: Store) -> None:
    ready = [venvs.ensure(project.command("--extra", "one"), f"worker.Class{i}") for i in range(8)]

    assert sum(venv.built for venv in ready) == 1
    assert len({venv.path for venv in ready}) == 1
    assert len({os.path.realpath(Path(venv.python).parent) for venv in ready}) == 1
    assert len(store.digests()) == 1


def test_only_a_change_of_its_packages_rebuilds_a_venv(project: Project) -> None:
    one, two = project.command("--extra", "one"), project.command("--extra", "two")
    venvs.ensure(one, "One")
    venvs.ensure(two, "Two")
    project.lock(delta="2.0")
    assert not venvs.ensure(one, "One").built
    changed = venvs.ensure(two, "Two")
    assert changed.built
    assert run_in(changed.python, "import delta; print(delta.VERSION)") == "2.0"
    project.lock(delta="1.0")
    assert not venvs.ensure(two, "Two").built  # the earlier venv still exists
    assert run_in(changed.python, "import delta; print(delta.VERSION)") == "1.0"


def test_manifest_describes_content_and_build(project: Project) -> None:
    ready = venvs.ensure(project.command("--extra", "one"), "A", job_id="job-7")
    manifest = ready.manifest
    assert manifest is not None
    assert [line.partition(" @ ")[0] for line in manifest.packages] == [
        "alpha==1.0",
        "beta==1.0",
        "gamma==2.0",
        "sample",
    ]
    assert manifest.digest == ready.digest
    assert manifest.python == "{}.{}.{}".format(*sys.version_info)
    assert manifest.job_id == "job-7"
    assert manifest.uv[0].isdigit()
    assert {"resolve", "fetch", "link", "compile", "check"} <= manifest.seconds.keys()
    assert manifest.num_bytes > 0
    assert "uv sync --frozen" in Path(manifest.log_path).read_text()


def test_progress_reports_each_phase_once_in_order(project: Project) -> None:
    events: list[Progress] = []
    venvs.ensure(project.command(), "A", progress=events.append)
    phases = [event.phase for event in events if event.state == "done"]
    assert phases == ["resolve", "fetch", "link", "compile", "check", "seal"]
    assert all(event.venv == "A" for event in events)
    assert all(event.digest for event in events if event.phase != "resolve")
    assert pickle.loads(pickle.dumps(events)) == events


def test_failure_is_reported_in_its_phase(project: Project) -> None:
    events: list[Progress] = []
    make_unbuildable(project)
    with pytest.raises(VenvBuildError):
        venvs.ensure(project.command(), "A", progress=events.append)
    assert [(event.phase, event.state) for event in events if event.state in ("done", "failed")] == [
        ("resolve", "done"),
        ("fetch", "failed"),
    ]


@pytest.mark.parametrize("variable", HOSTILE)
def test_inherited_variables_never_redirect_an_install(
    variable: str, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(foreign)], check=True)
    before = sorted(str(path) for path in foreign.rglob("*"))
    value = {"UV_PYTHON": foreign / "bin" / "python", "PYTHONPATH": foreign / "lib"}.get(variable, foreign)
    monkeypatch.setenv(variable, str(value))

    ready = venvs.ensure(project.command("--extra", "one", "--with", "epsilon"), "A")

    monkeypatch.delenv(variable)
    assert sorted(str(path) for path in foreign.rglob("*")) == before
    assert run_in(ready.python, "import beta, epsilon, sys; print(sys.prefix)") == str(ready.path)
    assert ready.manifest is not None
    assert ready.manifest.base_python == os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]


def test_job_forces_each_venv_once(project: Project) -> None:
    command = project.command()
    first = venvs.ensure(command, "A")
    forced = [venvs.ensure(command, name, force_rebuild=True, job_id="job-1") for name in ("A", "A", "B")]
    assert [venv.built for venv in forced] == [True, False, False]
    assert forced[0].path != first.path
    assert forced[0].digest == first.digest
    assert venvs.ensure(command, "A", force_rebuild=True, job_id="job-2").built
    assert venvs.ensure(command, "A", force_rebuild=True).built


def test_force_variable_rebuilds_once_per_job(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    command = project.command("--with", "epsilon")
    venvs.ensure(command, "A", job_id="job-0")
    base = venvs.ensure(project.command(), "Base", job_id="job-0")
    monkeypatch.setenv("NRL_FORCE_REBUILD_VENVS", "true")
    assert [venvs.ensure(command, "A", job_id="job-1").built for _ in range(3)] == [True, False, False]
    assert venvs.ensure(project.command(), "Base", job_id="job-1").path != base.path
    # A process without a job id counts as a job: one more build, not two.
    paths = [venvs.find_sealed(base.digest).path]
    for _ in range(2):
        venvs.create_local_venv(project.command(), "Base")
        paths.append(venvs.find_sealed(base.digest).path)
    assert paths[0] != paths[1] == paths[2]


def test_rebuild_keeps_the_venv_of_a_running_worker(project: Project, store: Store) -> None:
    first = venvs.ensure(project.command(), "A")
    code = (
        "import sys; print('up', flush=True); sys.stdin.readline(); import alpha.module_0, sys\n"
        "print(alpha.module_0.__file__, sys.executable)"
    )
    worker = subprocess.Popen([first.python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "up\n"
    second = venvs.ensure(project.command(), "A", force_rebuild=True)
    project.lock(alpha="2.0")
    third = venvs.ensure(project.command(), "A")  # now the name points to other packages

    output, _ = worker.communicate("\n")
    assert worker.returncode == 0
    assert output.split() == [
        str(first.path / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages" / "alpha" / "module_0.py"),
        str(first.path / "bin" / "python"),
    ]
    assert len({first.path, second.path, third.path}) == 3
    assert set(store.builds(first.digest)) == {first.path, second.path}
    venvs.prune()
    assert store.builds(first.digest) == []  # no name points to it


def test_failed_rebuild_keeps_the_old_venv(project: Project, store: Store) -> None:
    ready = venvs.ensure(project.command("--extra", "one"), "A")
    make_unbuildable(project)
    with pytest.raises(VenvBuildError):
        venvs.ensure(project.command("--extra", "one"), "A", force_rebuild=True)
    with pytest.raises(VenvBuildError):
        venvs.create_local_venv(project.command("--extra", "two"), "A", force_rebuild=True)
    assert run_in(ready.python, "import beta; print(beta.VERSION)") == "1.0"
    assert [path for digest in store.digests() for path in store.builds(digest)] == [ready.path]


def test_build_error_has_node_command_output_and_log(project: Project, store: Store) -> None:
    make_unbuildable(project)
    with pytest.raises(VenvBuildError) as caught:
        venvs.create_local_venv(project.command(), "A")
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.node
    assert "sync" in error.command
    assert "this package cannot be built" in error.output_tail
    assert "this package cannot be built" in Path(error.log_path).read_text()
    for part in (error.node, error.command, error.output_tail, error.log_path):
        assert part in str(error)
    assert all(not store.builds(digest) for digest in store.digests())
    assert not os.path.lexists(store.root / "A")


def make_unbuildable(project: Project) -> None:
    """Give the project a build back end that fails; the lock still matches."""
    (project.root / "backend.py").write_text(
        "def build_editable(*a, **k):\n    raise RuntimeError('this package cannot be built')\n"
        "def build_wheel(*a, **k):\n    raise RuntimeError('this package cannot be built')\n"
    )
    text = (project.root / "pyproject.toml").read_text()
    head = text.partition("[build-system]")[0]
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (project.root / "pyproject.toml").write_text(head + backend)


def test_ray_version_of_the_built_venv_is_checked(project: Project, store: Store) -> None:
    library = project.root / "ray"
    (library / "src" / "ray").mkdir(parents=True)
    (library / "src" / "ray" / "__init__.py").touch()
    (library / "pyproject.toml").write_text('[project]\nname = "ray"\nversion = "1.2.3"\n' + BUILD_SYSTEM)
    text = (project.root / "pyproject.toml").read_text().replace('["alpha==1.0"]', '["alpha==1.0", "ray"]')
    (project.root / "pyproject.toml").write_text(text + '[tool.uv.sources]\nray = { path = "ray" }\n')
    uv("lock", "--offline", cwd=project.root)
    driver = DriverVersions(DriverVersions.of_this_process().python, "2.0.0")
    with pytest.raises(IncompatibleVenvError, match=r"ray 1\.2\.3.*ray 2\.0\.0"):
        venvs.ensure(project.command(), "A", expected=driver)
    assert all(not store.builds(digest) for digest in store.digests())
    ready = venvs.ensure(project.command(), "A", expected=DriverVersions(driver.python, "1.2.3"))
    assert ready.manifest.ray == "1.2.3"
    with pytest.raises(IncompatibleVenvError, match=r"ray 1\.2\.3.*ray 2\.0\.0"):
        venvs.ensure(project.command(), "A", expected=driver)  # sealed for another driver


def test_python_mismatch_names_both_versions(project: Project) -> None:
    planned = venvs.plan(project.command())
    driver = DriverVersions("3.11.99", None)
    elsewhere = replace(planned, python=replace(planned.python, version="3.11.99"), expected=driver)
    with pytest.raises(IncompatibleVenvError, match=rf"{planned.python.version}.*3\.11\.99"):
        venvs.ensure(elsewhere, "A")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".store", "a b", "x" * 300, "-x"])
def test_invalid_name_is_rejected(name: str, project: Project) -> None:
    with pytest.raises(VenvError, match="is not a valid venv name"):
        venvs.create_local_venv(project.command(), name)


def test_foreign_directory_at_the_name_is_kept(project: Project, store: Store) -> None:
    (store.root / "A").mkdir(parents=True)
    (store.root / "A" / "mine").touch()
    with pytest.raises(VenvError, match="not a link that nemo_rl created"):
        venvs.create_local_venv(project.command(), "A")
    assert (store.root / "A" / "mine").exists()


def test_current_venv_digest_inside_a_venv(project: Project) -> None:
    ready = venvs.ensure(project.command("--with", "epsilon"), "A")
    source = Path(venvs.__file__).parent.parent.parent
    code = f"import sys; sys.path += {[str(source), *sys.path]!r}; from nemo_rl import venvs; "
    assert run_in(ready.python, code + "print(venvs.current_venv_digest())") == ready.digest
    assert venvs.current_venv_digest() is None


def test_activation_reaches_children(project: Project) -> None:
    ready = venvs.ensure(project.command(), "A")
    environment = {"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": "/other", "PYTHONHOME": "/other", "PYTHONPATH": "/other"}
    environment |= venvs.activation_env(Path(ready.python).parent.parent, environment)
    assert environment["PATH"].split(":") == [str(Path(ready.python).parent), "/usr/bin", "/bin"]
    process = subprocess.run(
        ["sh", "-c", "python -c 'import alpha, sys, site; print(sys.prefix, sys.path, site.ENABLE_USER_SITE)'"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.startswith(str(ready.path))
    assert "/other" not in process.stdout
    assert process.stdout.strip().endswith("False")


def test_import_loads_neither_ray_nor_torch() -> None:
    code = "import sys, json, nemo_rl.venvs; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    loaded = json.loads(run_in(sys.executable, code))
    assert not {"ray", "torch", "numpy", "transformers"} & set(loaded)
