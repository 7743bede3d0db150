"""Settings and fixtures for all tests."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine must not fail a test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell that starts the tests in the background makes them and their child processes ignore SIGINT. Tests that
# interrupt a process need the default handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run_with_simulated_memory(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a script with a private /proc/meminfo, from which Ray reads the free memory.

    The script receives the path of that file and then the other arguments, and prints JSON as its last line. See
    `simulated_memory`.
    """
    file = tmp_path / "meminfo"
    file.write_bytes(Path("/proc/meminfo").read_bytes())
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    isolated = ["unshare", "--mount", *root, "sh", "-c", 'mount --bind "$0" /proc/meminfo && exec "$@"', str(file)]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file is not permitted here")

    def run(script: Path, *arguments: object) -> dict[str, Any]:
        command = [*isolated, sys.executable, str(script), str(file), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), str(Path(__file__).parent)])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    return run
