"""Packages that are built from source: the variables that their builds receive, and builds without isolation."""

from __future__ import annotations

import io
import json
import tarfile
import textwrap
from pathlib import Path

import pytest
from sample_projects import Project, make_wheel, run_in, uv

from nemo_rl import venvs
from nemo_rl.errors import ConfigError, VenvBuildError, VenvDriftError
from nemo_rl.venvs.building.uv_config import uv_build_environment
from nemo_rl.venvs.uv import uv_environment

# Builds a wheel with the variables that the build received, and what could be imported.
BACKEND = """
import base64, hashlib, importlib.util, os, zipfile

NAME, VERSION = {name!r}, "1.0"

def build_wheel(directory, config_settings=None, metadata_directory=None):
    names = ["NVTE_FRAMEWORK", "CUDNN_HOME", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "CPLUS_INCLUDE_PATH", "CC", "CFLAGS",
             "CUDA_HOME", "FLAVOUR", "PYTHONPATH", "OWN"]
    seen = {{name: os.environ[name] for name in names if name in os.environ}}
    modules = [name for name in ("alpha", "beta", "gamma", "epsilon") if importlib.util.find_spec(name)]
    info = f"{{NAME}}-{{VERSION}}.dist-info"
    files = {{
        f"{{NAME}}.py": f"SEEN = {{seen!r}}\\nMODULES = {{modules!r}}\\n",
        f"{{info}}/METADATA": f"Metadata-Version: 2.1\\nName: {{NAME}}\\nVersion: {{VERSION}}\\n",
        f"{{info}}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }}
    rows = [f"{{info}}/RECORD,,"]
    with zipfile.ZipFile(os.path.join(directory, f"{{NAME}}-{{VERSION}}-py3-none-any.whl"), "w") as archive:
        for path, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            rows.append(f"{{path}},sha256={{digest}},{{len(text.encode())}}")
            archive.writestr(path, text)
        archive.writestr(f"{{info}}/RECORD", "\\n".join(rows) + "\\n")
    return f"{{NAME}}-{{VERSION}}-py3-none-any.whl"

build_editable = build_wheel
"""
BUILD_SYSTEM = '[build-system]\nrequires = {requires}\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def source_files(name: str, requires: list[str]) -> dict[str, str]:
    return {
        "PKG-INFO": f"Metadata-Version: 2.2\nName: {name}\nVersion: 1.0\n",
        "pyproject.toml": f'[project]\nname = "{name}"\nversion = "1.0"\n'
        + BUILD_SYSTEM.format(requires=json.dumps(requires)),
        "backend.py": BACKEND.format(name=name),
    }


def make_sdist(folder: Path, name: str = "native", requires: tuple[str, ...] = ()) -> None:
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as archive:
        for path, text in source_files(name, list(requires)).items():
            entry = tarfile.TarInfo(f"{name}-1.0/{path}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project that depends on the source package `native` and on alpha; uv has an empty cache."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    project = Project(tmp_path / "source", tmp_path / "source_wheels")
    project.root.mkdir()
    for name in ("alpha", "epsilon"):
        make_wheel(project.wheels, name, "1.0")
    make_sdist(project.wheels)
    return project


def lock(project: Project, *, uv_lines: str = "", tables: str = "", dependencies: str = '["native", "alpha"]') -> None:
    (project.root / "pyproject.toml").write_text(
        textwrap.dedent(f"""
            [project]
            name = "source"
            version = "1"
            requires-python = ">=3.11"
            dependencies = {dependencies}
            [tool.uv]
            package = false
            no-index = true
            find-links = ["{project.wheels}"]
        """)
        + uv_lines
        + "\n"
        + tables
    )
    uv("lock", "--offline", cwd=project.root)


def name_variables(*names: str) -> str:
    return f"[tool.nemo-rl]\nbuild-variables = {json.dumps(names)}\n"


def seen(python: str) -> dict[str, str]:
    return json.loads(run_in(python, "import json, native; print(json.dumps(native.SEEN))"))


VALUES = {
    "NVTE_FRAMEWORK": "pytorch",
    "CUDNN_HOME": "/opt/cudnn",
    "MAX_JOBS": "4",
    "TORCH_CUDA_ARCH_LIST": "9.0;10.0+PTX",
    "CPLUS_INCLUDE_PATH": '/opt/a b/include:/opt/"q"/\\n',
    "CC": "gcc-13",
    "CFLAGS": "-O3 -DX='y'",
    "CUDA_HOME": "/usr/local/cuda",
    "FLAVOUR": "vanilla",
}


@pytest.fixture(autouse=True)
def values(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VALUES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("in_project", "in_setting", "names"),
    [
        ((), "", ()),
        (("NVTE_*", "CUDNN_*"), "", ("NVTE_FRAMEWORK", "CUDNN_HOME")),
        ((), "MAX_JOBS,CC CFLAGS", ("MAX_JOBS", "CC", "CFLAGS")),
        (("TORCH_CUDA_ARCH_LIST", "ABSENT"), "CPLUS_INCLUDE_PATH", ("TORCH_CUDA_ARCH_LIST", "CPLUS_INCLUDE_PATH")),
        (("C*",), "", ("CUDNN_HOME", "CPLUS_INCLUDE_PATH", "CC", "CFLAGS", "CUDA_HOME")),
        (tuple(VALUES), "", tuple(VALUES)),
    ],
)
def test_builds_receive_the_named_variables_and_no_other(
    source: Project,
    monkeypatch: pytest.MonkeyPatch,
    in_project: tuple[str, ...],
    in_setting: str,
    names: tuple[str, ...],
) -> None:
    lock(source, tables=name_variables(*in_project))
    monkeypatch.setenv("NEMO_RL_BUILD_VARIABLES", in_setting)
    ready = venvs.ensure(source.command(), "A")
    assert seen(ready.python) == {name: VALUES[name] for name in names}
    assert ready.manifest is not None
    shown = {name: VALUES[name] for name in names}
    assert {name: ready.manifest.build_variables.get(name) for name in names} == shown


def test_values_of_named_variables_identify_a_venv(source: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv's cache holds the wheel of the first value. It must not be installed for the second."""
    lock(source, tables=name_variables("FLAVOUR"))
    first = venvs.ensure(source.command(), "A")
    assert seen(first.python) == {"FLAVOUR": "vanilla"}
    monkeypatch.setenv("NVTE_FRAMEWORK", "jax")  # not named
    assert not venvs.ensure(source.command(), "A").built

    monkeypatch.setenv("FLAVOUR", "mint")
    second = venvs.ensure(source.command(), "B")
    assert second.digest != first.digest
    assert seen(second.python) == {"FLAVOUR": "mint"}
    monkeypatch.setenv("NEMO_RL_VENV_DRIFT", "refuse")
    monkeypatch.setenv("FLAVOUR", "lemon")
    with pytest.raises(VenvDriftError, match=r"build variable FLAVOUR vanilla -> lemon"):
        venvs.ensure(source.command(), "A")
    monkeypatch.delenv("NEMO_RL_VENV_DRIFT")

    monkeypatch.delenv("FLAVOUR")
    third = venvs.ensure(source.command(), "C")
    assert seen(third.python) == {}
    assert len({first.digest, second.digest, third.digest}) == 3
    monkeypatch.setenv("FLAVOUR", "vanilla")
    again = venvs.ensure(source.command(), "A", force_rebuild=True)
    assert (again.digest, seen(again.python)) == (first.digest, {"FLAVOUR": "vanilla"})


def test_list_alone_does_not_change_a_digest(project: Project) -> None:
    digest = venvs.plan(project.command()).digest
    project.write(extra_text=name_variables("NOT_SET", "NEITHER_*"))
    uv("lock", "--offline", cwd=project.root)
    assert venvs.plan(project.command()).digest == digest


def test_editable_and_copied_packages_are_built_with_them(source: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for editable in (True, False):
        root = source.root.with_name(f"local_{editable}")
        root.mkdir()
        for path, text in source_files("native", []).items():
            (root / path).write_text(text)
        tables = f'[tool.uv.sources]\nnative = {{ path = "{root}", editable = {str(editable).lower()} }}\n'
        lock(source, tables=tables + name_variables("FLAVOUR"))
        for value in ("vanilla", "mint"):
            monkeypatch.setenv("FLAVOUR", value)
            assert seen(venvs.ensure(source.command(), "A").python) == {"FLAVOUR": value}


def test_overlays_are_built_with_them(source: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    lock(source, dependencies='["alpha"]', tables=name_variables("FLAVOUR"))
    digests = set()
    for value in ("vanilla", "mint"):
        monkeypatch.setenv("FLAVOUR", value)
        ready = venvs.ensure(source.command("--with", "native"), "A")
        digests.add(ready.digest)
        assert seen(ready.python) == {"FLAVOUR": value}
    assert len(digests) == 2


def test_plan_of_another_process_keeps_its_values(source: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node builds with the driver's values, also if it has to plan again."""
    lock(source, tables=name_variables("FLAVOUR"))
    plan = venvs.plan(source.command())
    assert "vanilla" not in repr(plan)
    monkeypatch.setenv("FLAVOUR", "of the node")
    (source.root / "pyproject.toml").write_text((source.root / "pyproject.toml").read_text() + "# changed\n")
    ready = venvs.ensure(plan, "A")
    assert (ready.digest, seen(ready.python)) == (plan.digest, {"FLAVOUR": "vanilla"})


def test_secret_values_stay_out_of_manifest_and_log(source: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    lock(source, tables=name_variables("OWN_TOKEN", "OWN"))
    monkeypatch.setenv("OWN_TOKEN", "s3cret-value")
    monkeypatch.setenv("OWN", "https://user:s3cret-value@host/")
    ready = venvs.ensure(source.command(), "A")
    assert ready.manifest is not None
    assert "s3cret-value" not in (ready.path / "nemo_rl_venv.json").read_text()
    assert "s3cret-value" not in Path(ready.manifest.log_path).read_text()
    assert seen(ready.python) == {"OWN": "https://user:s3cret-value@host/"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ('"MAX_JOBS"', "must be a list of names"),
        ("[1]", "must be a list of names"),
        ('["A-B"]', "'A-B' is not the name of a variable"),
        ('["*"]', r"'\*' is not the name of a variable"),
        ('["A*B"]', r"'A\*B' is not the name of a variable"),
        ('["PYTHONPATH"]', "builds cannot receive PYTHONPATH"),
        ('["UV_*"]', r"builds cannot receive UV_\*"),
        ('["VIRTUAL_ENV"]', "builds cannot receive VIRTUAL_ENV"),
    ],
)
def test_invalid_list_is_refused_with_its_file(source: Project, names: str, message: str) -> None:
    lock(source, tables=f"[tool.nemo-rl]\nbuild-variables = {names}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        venvs.plan(source.command())
    assert str(source.root / "pyproject.toml") in str(caught.value)


def test_invalid_setting_is_refused(source: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    lock(source)
    monkeypatch.setenv("NEMO_RL_BUILD_VARIABLES", "MAX_JOBS,UV_PYTHON")
    with pytest.raises(ConfigError, match="NEMO_RL_BUILD_VARIABLES: builds cannot receive UV_PYTHON"):
        venvs.plan(source.command())


def test_prefix_never_covers_reserved_variables(source: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    lock(source, tables=name_variables("P*", "F*"))
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    assert seen(venvs.ensure(source.command(), "A").python) == {"FLAVOUR": "vanilla"}


# --- isolation --------------------------------------------------------------------------------------------------------


def modules(python: str) -> list[str]:
    return json.loads(run_in(python, "import json, native; print(json.dumps(native.MODULES))"))


def test_package_without_build_isolation_imports_what_is_installed(source: Project) -> None:
    lock(source, uv_lines='no-build-isolation-package = ["native"]\n', tables=name_variables("FLAVOUR"))
    ready = venvs.ensure(source.command(), "A")
    assert modules(ready.python) == ["alpha"]
    assert seen(ready.python) == {"FLAVOUR": "vanilla"}


def test_overlay_without_build_isolation_imports_the_base(source: Project) -> None:
    lock(source, dependencies='["alpha"]', uv_lines='no-build-isolation-package = ["native"]\n')
    ready = venvs.ensure(source.command("--with", "native"), "A")
    assert modules(ready.python) == ["alpha"]


def test_extra_build_dependencies_are_installed_for_the_build(source: Project) -> None:
    lock(source, tables='[tool.uv.extra-build-dependencies]\nnative = ["epsilon"]\n' + name_variables("FLAVOUR"))
    ready = venvs.ensure(source.command(), "A")
    assert modules(ready.python) == ["epsilon"]
    assert seen(ready.python) == {"FLAVOUR": "vanilla"}
    assert run_in(ready.python, "import importlib.util; print(importlib.util.find_spec('epsilon'))") == "None"


def test_extra_build_variables_of_the_project_stay(source: Project) -> None:
    lock(source, tables='[tool.uv.extra-build-variables]\nnative = { OWN = "1" }\n' + name_variables("FLAVOUR"))
    assert seen(venvs.ensure(source.command(), "A").python) == {"OWN": "1", "FLAVOUR": "vanilla"}


def test_failed_build_shows_its_output(source: Project) -> None:
    lock(source, tables='[tool.uv.extra-build-dependencies]\nnative = ["absent"]\n')
    with pytest.raises(VenvBuildError, match="absent"):
        venvs.ensure(source.command(), "A")


# --- uv's configuration files -----------------------------------------------------------------------------------------


def test_configuration_of_the_system_stays_in_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uv").mkdir()
    (tmp_path / "uv" / "uv.toml").write_text('offline = true\n[extra-build-variables]\nother = { A = "1" }\n')
    monkeypatch.setenv("XDG_CONFIG_DIRS", f"{tmp_path / 'absent'}:{tmp_path}")
    with uv_build_environment({"FLAVOUR": "x"}, ["native", "other"]) as variables:
        text = Path(variables["XDG_CONFIG_DIRS"], "uv", "uv.toml").read_text()
    assert text.startswith("offline = true")
    assert '[extra-build-variables."native"]' in text
    assert '"other"' not in text, "it would be defined twice"
    assert not Path(variables["XDG_CONFIG_DIRS"]).exists()
    with uv_build_environment({}, ["native"]) as variables:
        assert variables == {}


@pytest.mark.parametrize("how", ["UV_CONFIG_FILE", "UV_NO_CONFIG"])
def test_build_with_another_configuration(source: Project, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    lock(source, tables=name_variables("FLAVOUR"))
    file = source.root / "other.toml"
    file.write_text(f'no-index = true\nfind-links = ["{source.wheels}"]\n')
    monkeypatch.setenv(how, str(file) if how == "UV_CONFIG_FILE" else "1")
    for value in ("vanilla", "mint"):
        monkeypatch.setenv("FLAVOUR", value)
        assert seen(venvs.ensure(source.command(), "A").python) == {"FLAVOUR": value}
    assert uv_environment()[how]


def test_overlay_of_changed_local_code_is_built_offline(source: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    lock(source, dependencies='["alpha"]')
    monkeypatch.setenv("UV_OFFLINE", "1")
    root = source.root.with_name("local")
    root.mkdir()
    for path, text in source_files("native", []).items():
        (root / path).write_text(text)
    for value in ("1", "2"):
        (root / "backend.py").write_text(
            BACKEND.format(name="native").replace("MODULES = {", f"CODE = {value}; MODULES = {{")
        )
        ready = venvs.ensure(source.command("--with", str(root)), "A")
        assert run_in(ready.python, "import native; print(native.CODE)") == value
