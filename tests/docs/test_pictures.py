"""Tests that generated pictures in the documentation are up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_broadcast_model_picture_is_up_to_date(tmp_path: Path) -> None:
    target = tmp_path / "model.svg"
    command = [sys.executable, REPOSITORY / "benchmarks" / "broadcast_model.py", "--picture", target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "4,096" in done.stdout
    assert target.read_bytes() == (REPOSITORY / "docs" / "images" / "broadcast_model.svg").read_bytes()
    altered = subprocess.run([*command, "--unpack", "0.4"], capture_output=True, text=True, check=True)
    assert altered.stdout != done.stdout
    assert target.read_bytes() != (REPOSITORY / "docs" / "images" / "broadcast_model.svg").read_bytes()
