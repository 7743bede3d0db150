"""Scripts with inline metadata (PEP 723) as py_executable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, make_wheel, run_in, uv, write_files

from nemo_rl import venvs
from nemo_rl.errors import IncompatibleVenvError, InvalidPyExecutableError, LockMismatchError, VenvError
from nemo_rl.venvs import VenvSpec, parse_py_executable, plan
from nemo_rl.venvs.uv import find_uv

SCRIPT = """#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["{dependencies}"]
# [tool.uv]
# no-index = true
# find-links = ["{wheels}"]
# [tool.uv.sources]
# local = { path = "local" }
# ///
import importlib.metadata

print(sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions()))
"""


def write_script(root: Path, wheels: Path, dependencies: str) -> Path:
    write_files(root, {"job.py": SCRIPT}, wheels=str(wheels), dependencies=dependencies)
    script = root / "job.py"
    script.chmod(0o755)
    return script


def test_venv_equals_that_of_uv_run(tmp_path: Path, project_template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "local/pyproject.toml": '[project]\nname = "local"\nversion = "1"\n' + BUILD_SYSTEM,
        "local/src/local/__init__.py": "",
    }
    write_files(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    for dependencies in ('alpha==1.0", "local', 'alpha==2.0", "beta'):
        script = write_script(tmp_path, project_template, dependencies)
        command = [find_uv(), "run", "--quiet", "--exact", "--python", sys.executable, "--script", str(script)]
        expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for text in ("./job.py", str(script), "uv run --script job.py"):
            assert run_in(venvs.create_local_venv(text, "A"), script.read_text()) == expected


def test_unpinned_package_keeps_its_version(tmp_path: Path, project_template: Path) -> None:
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "alpha", "1.0")
    script = write_script(tmp_path, wheels, "alpha")
    first = plan(str(script))
    make_wheel(wheels, "alpha", "2.0")
    assert plan(str(script)).digest == first.digest
    assert [str(package) for package in first.packages] == ["alpha==1.0"]


def test_lock_of_a_script_counts(tmp_path: Path, project_template: Path) -> None:
    script = write_script(tmp_path, project_template, "alpha<2")
    uv("lock", "--script", str(script), cwd=tmp_path)
    write_script(tmp_path, project_template, "alpha")
    uv("lock", "--script", str(script), cwd=tmp_path)  # uv keeps the locked version
    assert plan(str(script)).requirements == ("alpha==1.0",)
    write_script(tmp_path, project_template, "alpha>=2")
    with pytest.raises(LockMismatchError, match="uv lock --script"):
        plan(str(script))


def test_packages_can_be_added(tmp_path: Path, project_template: Path) -> None:
    script = write_script(tmp_path, project_template, "alpha==1.0")
    wheel = project_template / "gamma-1.0-py3-none-any.whl"
    spec = venvs.spec_from_runtime_env({"pip": [str(wheel)]}, str(script))
    assert run_in(venvs.ensure(spec, "A").python, "import alpha, gamma; print(alpha.VERSION)") == "1.0"


def test_python_that_the_script_refuses(tmp_path: Path, project_template: Path) -> None:
    script = write_script(tmp_path, project_template, "alpha")
    script.write_text(script.read_text().replace(">=3.11", ">=3.99"))
    with pytest.raises(IncompatibleVenvError, match=rf">=3\.99.*{sys.version.split()[0]}"):
        plan(str(script))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("job.py", "print(1)\n", "without inline metadata"),
        ("job", "#!/usr/bin/env -S uv run --script\nprint(1)\n", "without inline metadata"),
        ("job.py", "# /// script\n# dependencies = [\n# ///\n", "not valid TOML"),
    ],
)
def test_other_scripts_are_rejected_and_do_not_run(tmp_path: Path, name: str, text: str, message: str) -> None:
    script = tmp_path / name
    script.write_text(text)
    script.chmod(0o755)
    with pytest.raises(InvalidPyExecutableError, match=message):
        parse_py_executable(str(script))


def test_missing_script_is_reported() -> None:
    with pytest.raises(VenvError, match="no interpreter at"):
        venvs.ensure("/nowhere/job.py", "A")


def test_canonical_string(tmp_path: Path, project_template: Path) -> None:
    script = write_script(tmp_path, project_template, "alpha")
    spec = parse_py_executable(os.path.relpath(script))
    assert spec == VenvSpec(project=str(tmp_path), script=str(script))
    assert parse_py_executable(str(spec)) == spec
