"""Tests that the first program of the documentation prints what the pages show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_pages_show_the_printed_output(tmp_path: Path) -> None:
    env = {**os.environ, "NEMO_RL_VENV_DIR": str(tmp_path / "venvs"), "RAY_ADDRESS": "local"}
    command = [sys.executable, "examples/hello_workers.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in (REPOSITORY / "README.md", REPOSITORY / "docs" / "first-worker.md"):
        output = re.search(
            r"^\$ uv run examples/hello_workers.py\n(.*?)```", page.read_text(), re.MULTILINE | re.DOTALL
        )
        assert output is not None
        assert done.stdout == output[1]
