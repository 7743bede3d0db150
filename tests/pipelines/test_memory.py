"""Memory use does not grow with the size of the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("memory_script.py")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["actor_pool", "ray_data"])
def test_data_exceeds_shared_memory(executor: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), executor], capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert result["sums"] == list(range(1, 51))
    # The pipeline processes 1,000 MiB in tasks of 20 MiB. Mapped shared memory (100 MiB) counts as process memory.
    assert result["driver_growth_mb"] < 350
    assert result["worker_mb"] < 700
