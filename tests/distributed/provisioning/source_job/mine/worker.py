"""A worker class of a user's package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import ray

import nemo_rl

try:
    from mine.fresh import WRITTEN  # a module that the test writes and git does not track
except ImportError:
    WRITTEN = "committed"


class Worker:
    def answer(self) -> dict[str, object]:
        """Return which code this worker and its children run."""
        child = subprocess.run(
            [sys.executable, "-c", "import mine.worker; print(mine.worker.WRITTEN)"],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
        )
        return {
            "written": WRITTEN,
            "child": child.stdout.strip(),
            "module": __file__,
            "nemo_rl": nemo_rl.__file__,
            "has_small": importlib.util.find_spec("small") is not None,
            "node_id": ray.get_runtime_context().get_node_id(),
        }
