"""Tests `nemo-rl` with a closed pipe, a full disk and a limited locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = f"{sys.executable} -m nemo_rl.cli venvs prune"


def shell(line: str, store: Path, stdout: int = subprocess.PIPE, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "NEMO_RL_VENV_DIR": str(store), **env}
    return subprocess.run(
        ["bash", "-c", line],
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_is_silent(tmp_path: Path, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = shell(COMMAND, tmp_path, writer, PYTHONUNBUFFERED=unbuffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_disk_is_one_message(tmp_path: Path, unbuffered: str) -> None:
    done = shell(f"{COMMAND} >/dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr.startswith("nemo-rl: ")
    assert done.stderr.strip().endswith("No space left on device")
    assert len(done.stderr.splitlines()) == 1


def test_closed_standard_output_is_accepted(tmp_path: Path) -> None:
    done = shell(f"{COMMAND} >&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_characters_outside_the_locale_are_escaped(tmp_path: Path) -> None:
    done = shell(f"{COMMAND.rpartition(' ')[0]} why base n\u00fcmpy", tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (1, "")
    assert "base does not have n\\xfcmpy." in done.stdout
