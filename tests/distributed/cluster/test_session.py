"""Joining and starting Ray: each case in processes of its own, as drivers are."""

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

def tell(**facts):
    print(json.dumps(facts), flush=True)

def told(answer=None):
    return sys.stdin.readline()
"""


class Driver:
    """A driver process that runs a script, step by step: each `tell(...)` is one line for the test."""

    def __init__(self, script: str, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PREAMBLE + textwrap.dedent(script)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> dict:
        line = _pipe(self.process.stdout).readline()
        assert line, _pipe(self.process.stderr).read()
        return json.loads(line)

    def go_on(self) -> None:
        _pipe(self.process.stdin).write("\n")
        _pipe(self.process.stdin).flush()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            _pipe(pipe).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """Ray puts sockets below `TMPDIR`, whose paths must not be long."""
    with tempfile.TemporaryDirectory(prefix="nrl", dir="/tmp", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture
def environment(short_tmp: Path) -> dict[str, str]:
    """What a user's shell has, with a temporary directory of its own, so that nobody else's cluster is joined."""
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


_STAY = """
init_ray()
tell(address=ray.get_runtime_context().gcs_address)
told()
"""


def test_drivers_that_see_the_same_gpus_share_a_cluster_and_others_do_not(start) -> None:
    owner = start(_STAY)
    address = owner.hear()["address"]
    same, other, alone = start(_STAY), start(_STAY, CUDA_VISIBLE_DEVICES="0"), start(_STAY, RAY_ADDRESS="local")
    assert same.hear()["address"] == address
    assert len({address, other.hear()["address"], alone.hear()["address"]}) == 3
    named = start(_STAY, RAY_ADDRESS=address, RAY_AUTH_MODE="token", CUDA_VISIBLE_DEVICES="3")
    assert named.hear()["address"] == address


def test_neither_a_strangers_cluster_nor_one_that_died_is_joined(start) -> None:
    stranger = start(
        """
        ray.init(address="local", include_dashboard=False)
        tell(address=ray.get_runtime_context().gcs_address)
        told()
        """
    )
    dead = start(_STAY)
    others = {stranger.hear()["address"], dead.hear()["address"]}
    dead.process.kill()
    dead.process.wait()
    assert start(_STAY).hear()["address"] not in others


def test_two_drivers_started_at_the_same_moment_share_one_cluster(start) -> None:
    drivers = [start(_STAY) for _ in range(2)]
    assert len({driver.hear()["address"] for driver in drivers}) == 1


def test_a_local_cluster_listens_on_loopback_has_no_dashboard_and_ships_nothing(start, short_tmp: Path) -> None:
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
        tell(
            again=before == ray.get_runtime_context().gcs_address,
            listening=sorted(listening),
            dashboard=ray._private.worker._global_node.webui_url,
            runtime_env=dict(ray.get_runtime_context().runtime_env),
            hook=os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"],
        )
        told()
        """
    )
    facts = driver.hear()
    assert facts["again"]
    assert set(facts["listening"]) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert facts["listening"]
    assert not facts["dashboard"]
    assert facts["runtime_env"] == {}
    assert facts["hook"] == "0"
    link = short_tmp / "logs" / "ray"
    assert link.is_symlink()
    assert (link / "logs" / "raylet.out").exists()


def test_workers_inherit_documented_variables_only(start) -> None:
    driver = start(
        """
        init_ray()
        @ray.remote
        def seen():
            return {name: os.environ.get(name) for name in ("DB_PASSWORD", "MY_SETTING", "HF_HOME", "PATH")}
        tell(workers=ray.get(seen.remote()), own=dict(os.environ))
        """,
        DB_PASSWORD="hunter2",
        MY_SETTING="1",
        HF_HOME="/models",
    )
    heard = driver.hear()
    assert heard["workers"]["DB_PASSWORD"] is None
    assert heard["workers"]["MY_SETTING"] is None
    assert heard["workers"]["HF_HOME"] == "/models"
    assert heard["workers"]["PATH"]
    # The driver's own environment is as it was.
    assert (heard["own"]["DB_PASSWORD"], heard["own"]["MY_SETTING"]) == ("hunter2", "1")


def test_a_driver_that_uv_run_started_does_not_ship_its_directory(start, environment) -> None:
    """Ray's hook looks for `uv run` among the driver's parents; with the hook on, workers would be started by uv."""
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
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    executable, runtime_env, (worker_executable, _) = json.loads(done.stdout.splitlines()[-1])
    assert runtime_env == {}
    assert worker_executable == executable


def test_an_address_where_nothing_runs_is_a_cluster_error(start) -> None:
    driver = start(
        """
        from nemo_rl.errors import ClusterError
        try:
            init_ray()
        except ClusterError as error:
            tell(message=str(error))
        """,
        RAY_ADDRESS="127.0.0.1:1",
    )
    message = driver.hear()["message"]
    assert "RAY_ADDRESS=127.0.0.1:1" in message
    assert "RAY_AUTH_MODE=token" in message


def test_ray_starts_with_a_read_only_home_and_a_temporary_directory_too_deep_for_sockets(start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    assert start(_STAY, HOME=str(tmp_path / "file" / "home"), TMPDIR=str(deep)).hear()["address"]


@pytest.mark.parametrize(
    "variables", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}]
)
def test_a_local_cluster_lets_nobody_in_without_its_token(start, variables: dict[str, str]) -> None:
    address = start(_STAY).hear()["address"]
    # Not ray.init, which tries again for minutes.
    stranger = start(
        f"""
        try:
            ray._raylet.GcsClient(address={address!r})
        except ray.exceptions.AuthenticationError as error:
            tell(refused=str(error))
        """,
        **variables,
    )
    assert "InvalidAuthToken" in stranger.hear()["refused"]


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_record_of_clusters_that_others_may_write_is_not_trusted(start, short_tmp: Path, mode: int) -> None:
    directory = short_tmp / f"nemo_rl-{os.getuid()}"
    directory.mkdir()
    directory.chmod(mode)
    driver = start(
        """
        from nemo_rl.errors import ClusterError
        try:
            init_ray()
        except ClusterError as error:
            tell(error=str(error))
        """
    )
    assert "is writable by other users" in driver.hear()["error"]
