"""Runs the Slurm example on a real Slurm with two nodes: jobs that succeed, fail and are cancelled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "try_slurm.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="namespaces need root and iproute2")
@pytest.mark.skipif(shutil.which("slurmd") is None, reason="Slurm is not installed: see tools/try_slurm.py")
def test_slurm_jobs_end_as_expected() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    good, bad, cancelled = (json.loads(line) for line in done.stdout.splitlines())
    assert (good["state"], good["steps"], good["nodes"]) == ("COMPLETED", 3, 2)
    assert (bad["state"], cancelled["state"]) == ("FAILED", "CANCELLED")
    for outcome in (good, bad, cancelled):
        assert (outcome["remaining_processes"], outcome["remaining_tokens"]) == ([], [])
