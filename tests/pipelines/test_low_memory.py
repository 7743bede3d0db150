"""Workers that Ray's memory monitor kills. Ray reports these deaths with a different error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("low_memory_script.py")


@pytest.mark.slow
def test_memory_monitor_kills_workers(run_with_simulated_memory: Callable[..., Any], tmp_path: Path) -> None:
    result = run_with_simulated_memory(SCRIPT, tmp_path)
    assert result["once"] == list(range(1, 33))
    assert result["always"] == [n for n in range(16) if n not in (8, 9)]
    ((task_id, error),) = result["failed"]
    assert task_id == "b4"
    assert "its worker died 3 times: 1 worker(s) were killed due to the node running low on memory" in error
    assert result["gather"] == list(range(1, 9))
    assert result["deaths"] == {"once": 1, "always": 3, "gather": 1}
