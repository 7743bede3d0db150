"""Targets of the command line are extras that uv knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl.cli.targets import find_target
from nemo_rl.errors import ConfigError
from nemo_rl.venvs.uv import find_uv, uv_environment


def test_extras_are_those_of_the_workspace_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = tmp_path / "one"
    member.mkdir()
    (tmp_path / "pyproject.toml").write_text('[tool.uv.workspace]\nmembers = ["one"]\n')
    (member / "pyproject.toml").write_text(
        '[project]\nname = "one"\nversion = "1"\nrequires-python = ">=3.11"\n'
        "[project.optional-dependencies]\nfast = []\n"
    )
    command = [find_uv(), "lock", "--quiet", "--offline", "--python", sys.executable]
    subprocess.run(command, cwd=tmp_path, env=uv_environment(), check=True)
    monkeypatch.setenv("NEMO_RL_PROJECT_ROOT", os.fspath(member))
    assert find_target("fast").py_executable.endswith(f"--extra fast --project {member}")
    with pytest.raises(ConfigError, match="Extras: base, fast"):
        find_target("slow")
