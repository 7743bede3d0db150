"""Joining and starting Ray clusters. Each driver is a separate process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

_PREAMBLE = """
import json, os, sys
import ray
from nemo_rl.distributed.virtual_cluster import init_ray

def report(**values):
    print(json.dumps(values), flush=True)

def wait_for_end():
    return sys.stdin.readline()
"""


class Driver:
    """A driver process that runs a script. Each `report(...)` of the script is one line for the test."""

    def __init__(self, script: str, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PREAMBLE + textwrap.dedent(script)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read_report(self) -> dict:
        line = _pipe(self.process.stdout).readline()
        assert line, _pipe(self.process.stderr).read()
        return json.loads(line)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=400)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            _pipe(pipe).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """Return a short temporary directory, because Ray creates sockets below `TMPDIR` and their paths must be short."""
    with tempfile.TemporaryDirectory(prefix="nrl", dir="/tmp", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture
def environment(short_tmp: Path) -> dict[str, str]:
    """Return the variables of a user's shell with a private `TMPDIR`, so that no other cluster is joined."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "NEMO_RL_", "NRL_"))}
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    return {**variables, "TMPDIR": str(short_tmp)}


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator:
    drivers: list[Driver] = []

    def start(script: str, **variables: str) -> Driver:
        drivers.append(Driver(script, {**environment, **variables}))
        return drivers[-1]

    yield start
    for driver in reversed(drivers):
        driver.end()


_DRIVER = """
init_ray()
report(address=ray.get_runtime_context().gcs_address)
wait_for_end()
"""


@pytest.mark.slow
def test_drivers_with_the_same_gpus_share_a_cluster(start) -> None:
    owner = start(_DRIVER)
    address = owner.read_report()["address"]
    same, other, alone = (
        start(_DRIVER),
        start(_DRIVER, CUDA_VISIBLE_DEVICES="0"),
        start(_DRIVER, RAY_ADDRESS="local"),
    )
    assert same.read_report()["address"] == address
    assert len({address, other.read_report()["address"], alone.read_report()["address"]}) == 3
    named = start(_DRIVER, RAY_ADDRESS=address, RAY_AUTH_MODE="token", CUDA_VISIBLE_DEVICES="3")
    assert named.read_report()["address"] == address


@pytest.mark.slow
def test_foreign_and_dead_clusters_are_not_joined(start) -> None:
    foreign = start(
        """
        ray.init(address="local", include_dashboard=False)
        report(address=ray.get_runtime_context().gcs_address)
        wait_for_end()
        """
    )
    dead = start(_DRIVER)
    others = {foreign.read_report()["address"], dead.read_report()["address"]}
    dead.process.kill()
    dead.process.wait()
    assert start(_DRIVER).read_report()["address"] not in others


@pytest.mark.slow
def test_drivers_started_together_share_a_cluster(start) -> None:
    drivers = [start(_DRIVER) for _ in range(2)]
    assert len({driver.read_report()["address"] for driver in drivers}) == 1


@pytest.mark.slow
def test_local_cluster_is_on_loopback_without_dashboard(start, short_tmp: Path) -> None:
    driver = start(
        """
        import psutil
        init_ray(log_dir=os.environ["TMPDIR"] + "/logs")
        before = ray.get_runtime_context().gcs_address
        init_ray()
        node = psutil.Process()
        listening = {
            connection.laddr.ip
            for process in [node, *node.children(recursive=True)]
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        report(
            same=before == ray.get_runtime_context().gcs_address,
            listening=sorted(listening),
            dashboard=ray._private.worker._global_node.webui_url,
            runtime_env=dict(ray.get_runtime_context().runtime_env),
            hook=os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"],
        )
        wait_for_end()
        """
    )
    facts = driver.read_report()
    assert facts["same"]
    assert set(facts["listening"]) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert facts["listening"]
    assert not facts["dashboard"]
    assert facts["runtime_env"] == {}
    assert facts["hook"] == "0"
    link = short_tmp / "logs" / "ray"
    assert link.is_symlink()
    assert (link / "logs" / "raylet.out").exists()


def test_workers_inherit_only_documented_variables(start) -> None:
    driver = start(
        """
        init_ray()
        @ray.remote
        def seen():
            names = ("DB_PASSWORD", "MY_SETTING", "HF_HOME", "PATH")
            return {name: os.environ.get(name) for name in names} | {"niceness": os.nice(0)}
        report(workers=ray.get(seen.remote()), driver=dict(os.environ), niceness=os.nice(0))
        """,
        DB_PASSWORD="hunter2",
        MY_SETTING="1",
        HF_HOME="/models",
    )
    reported = driver.read_report()
    assert reported["workers"]["DB_PASSWORD"] is None
    assert reported["workers"]["MY_SETTING"] is None
    assert reported["workers"]["HF_HOME"] == "/models"
    assert reported["workers"]["PATH"]
    assert reported["workers"]["niceness"] == reported["niceness"]
    # The driver's environment is unchanged.
    assert (reported["driver"]["DB_PASSWORD"], reported["driver"]["MY_SETTING"]) == ("hunter2", "1")


@pytest.mark.slow
def test_driver_started_by_uv_run_uploads_nothing(start, environment) -> None:
    """Ray's hook looks for `uv run` among the driver's parent processes and would start workers with uv."""
    script = textwrap.dedent(
        """
        import ray  # before nemo_rl: Ray reads its variable when it is imported
        from nemo_rl.distributed.virtual_cluster import init_ray
        init_ray()

        @ray.remote(num_cpus=0)
        def where():
            import os, sys
            return sys.executable, os.getcwd()

        import json, sys
        print(json.dumps([sys.executable, dict(ray.get_runtime_context().runtime_env), ray.get(where.remote())]))
        """
    )
    command = ["uv", "run", "--no-project", "--python", sys.executable, "python", "-c", script]
    done = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": os.getcwd()},
        cwd=os.getcwd(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    executable, runtime_env, (worker_executable, _) = json.loads(done.stdout.splitlines()[-1])
    assert runtime_env == {}
    assert worker_executable == executable


def test_unreachable_address_is_a_cluster_error(start) -> None:
    driver = start(
        """
        from nemo_rl.errors import ClusterError
        try:
            init_ray()
        except ClusterError as error:
            report(message=str(error))
        """,
        RAY_ADDRESS="127.0.0.1:1",
    )
    message = driver.read_report()["message"]
    assert "RAY_ADDRESS=127.0.0.1:1" in message
    assert "RAY_AUTH_MODE=token" in message


@pytest.mark.slow
def test_ray_starts_with_read_only_home_and_deep_tmpdir(start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    assert start(_DRIVER, HOME=str(tmp_path / "file" / "home"), TMPDIR=str(deep)).read_report()["address"]


def test_token_of_a_local_cluster_is_private(start, tmp_path: Path) -> None:
    assert start(_DRIVER, HOME=str(tmp_path)).read_report()["address"]
    assert [path.name for path in (tmp_path / ".ray").iterdir()] == ["auth_token"]
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}]
)
def test_local_cluster_requires_its_token(start, variables: dict[str, str]) -> None:
    address = start(_DRIVER).read_report()["address"]
    # Not ray.init, which retries for minutes.
    intruder = start(
        f"""
        try:
            ray._raylet.GcsClient(address={address!r})
        except ray.exceptions.AuthenticationError as error:
            report(refused=str(error))
        """,
        **variables,
    )
    assert "InvalidAuthToken" in intruder.read_report()["refused"]


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_record_directory_writable_by_others_is_rejected(start, short_tmp: Path, mode: int) -> None:
    directory = short_tmp / f"nemo_rl-{os.getuid()}"
    directory.mkdir()
    directory.chmod(mode)
    driver = start(
        """
        from nemo_rl.errors import ClusterError
        try:
            init_ray()
        except ClusterError as error:
            report(error=str(error))
        """
    )
    assert "is writable by other users" in driver.read_report()["error"]
