"""Tests an environment in its own actor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("low_memory_environment_script.py")


@pytest.mark.slow  # starts a cluster
def test_environment_killed_for_memory_has_died(run_with_simulated_memory: Callable[..., Any]) -> None:
    result = run_with_simulated_memory(SCRIPT)
    assert result["reward"] == [1.0]
    assert (
        "MathEnvironment has died: 1 worker(s) were killed due to the node running low on memory" in result["failure"]
    )
