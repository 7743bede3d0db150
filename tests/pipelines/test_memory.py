"""Memory does not grow with the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("memory_script.py")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["actor_pool", "ray_data"])
def test_ten_times_more_data_than_shared_memory_holds(executor: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), executor], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert result["sums"] == list(range(1, 51))
    # 1,000 MiB pass through; a task is 20 MiB, and shared memory (100 MiB) counts where it is mapped.
    assert result["driver_growth_mb"] < 350
    assert result["worker_mb"] < 700
