"""Runs the Slurm example on a real Slurm with two nodes; see the tool for what its jobs cover."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "try_slurm.py"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="namespaces need root and iproute2")
@pytest.mark.skipif(shutil.which("slurmd") is None, reason="Slurm is not installed: see tools/try_slurm.py")
def test_slurm_jobs_end_as_expected() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 5, done.stdout
