"""A driver must import the same code of a local package as its workers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl.distributed.provisioning.driver_copy import check_driver_copies
from nemo_rl.errors import ConfigError
from nemo_rl.venvs import VenvPlan, plan
from nemo_rl.venvs.uv import find_uv


@pytest.fixture(params=["src", "."])
def workers_plan(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VenvPlan:
    """The plan of a project whose package the driver imports from `tmp_path / "driver"`."""
    project = tmp_path / "project"
    package = project / request.param / "shared_code"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("CODE = 1\n")
    (project / "pyproject.toml").write_text(
        '[project]\nname = "shared-code"\nversion = "1.0"\nrequires-python = ">=3.11"\n'
        '[build-system]\nrequires = ["uv_build>=0.9,<0.15"]\nbuild-backend = "uv_build"\n'
        f'[tool.uv.build-backend]\nmodule-root = "{"" if request.param == "." else request.param}"\n'
    )
    subprocess.run([find_uv(), "lock", "--quiet", "--python", sys.executable, "--project", str(project)], check=True)
    shutil.copytree(package, tmp_path / "driver" / "shared_code")
    monkeypatch.syspath_prepend(str(tmp_path / "driver"))
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "venvs"))
    return plan(f"uv run --locked --project {project}")


def test_equal_copy_is_accepted(workers_plan: VenvPlan) -> None:
    check_driver_copies({"a.Worker": workers_plan})


def test_different_copy_is_refused_with_both_paths(workers_plan: VenvPlan, tmp_path: Path) -> None:
    (tmp_path / "driver" / "shared_code" / "helper.py").write_text("CODE = 2\n")
    (package,) = (tmp_path / "project").rglob("shared_code")
    message = (
        f"imports shared_code from {tmp_path}/driver/shared_code, .*a.Worker.* from {package}, and helper.py differs"
    )
    with pytest.raises(ConfigError, match=message):
        check_driver_copies({"a.Worker": workers_plan})


def test_package_that_the_driver_cannot_import_is_not_compared(workers_plan: VenvPlan, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "driver" / "shared_code")
    check_driver_copies({"a.Worker": workers_plan})
