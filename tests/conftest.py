"""Fixtures and settings for all tests.

Test files run in several processes (pytest-xdist), each file in one of them. A file may start Ray, a whole job, or
nodes that claim more CPUs than there are, so each process gets a temporary directory of its own: `init_ray` keeps the
record of a local cluster there, and no test joins the cluster of another process.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Most tests wait: for Ray, for uv, for a process that they started. So there are more processes than cores, but few,
# because some tests fill a core and take gigabytes.
MAX_PROCESSES = 4


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The number of processes for `-n auto`; 0 runs the tests in this process."""
    files = [Path(argument.partition("::")[0]) for argument in config.args]
    if len(files) == 1 and files[0].is_file():
        return 0
    return min((os.cpu_count() or 1) + 1, MAX_PROCESSES)


# Whole jobs first: if they came last, one process would run them while the others have nothing left to do.
LONGEST_FIRST = ("functional", "benchmarks", "models", "pipelines", "distributed", "environments", "cli", "jobs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        package = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONGEST_FIRST.index(package) if package in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


# Processes that tests start read nemo_rl's bytecode instead of compiling it, also where an image turns writing off.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Short, because Ray puts the paths of its sockets below it.
    directory = Path(f"/tmp/nrl-tests-{os.getuid()}-{worker}")
    directory.mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory)

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
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    return run
