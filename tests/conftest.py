"""For all tests."""

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

# No test fails because a machine is busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell that starts the tests in the background lets them ignore SIGINT, and every process that they start as well:
# those that are interrupted by a test would not notice.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run_with_own_memory(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that runs a script where /proc/meminfo is a file of its own, by which Ray judges how much is free.

    The script gets that file's path, then the other arguments, and prints JSON as its last line. See `OwnMemory`.
    """
    file = tmp_path / "meminfo"
    file.write_bytes(Path("/proc/meminfo").read_bytes())
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    apart = ["unshare", "--mount", *root, "sh", "-c", 'mount --bind "$0" /proc/meminfo && exec "$@"', str(file)]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("nobody may mount anything here")

    def run(script: Path, *arguments: object) -> dict[str, Any]:
        command = [*apart, sys.executable, str(script), str(file), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), str(Path(__file__).parent)])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    return run
