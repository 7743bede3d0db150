"""A Python for environments that run in a child process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an interpreter without packages, of another version than this one if there is another."""
    names = [f"python3.{minor}" for minor in (12, 13, 14, 10) if minor != sys.version_info.minor]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [str(path) for name in names for path in pyenv.glob(f"*/bin/{name}")]
    found += [path for name in names if (path := shutil.which(name)) is not None]
    venv = tmp_path_factory.mktemp("bare") / "venv"
    for base in [*found, sys.executable]:
        command = [base, "-m", "venv", "--without-pip", str(venv)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return str(venv / "bin" / "python")
    raise AssertionError("no interpreter can make a venv")
