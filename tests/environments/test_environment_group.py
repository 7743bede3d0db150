"""Groups of environment workers on a local Ray cluster: balance, failures, restarts, and their end."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from episode_replies import next_replies

from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.distributed.workers.launch_plan import WorkerPython, prepare_child_python
from nemo_rl.environments import replica_start
from nemo_rl.environments.environment_group import EnvironmentGroup
from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.errors import (
    AttestationError,
    EnvironmentFailure,
    ResourceInsufficientError,
    RuntimeEnvError,
    WorkerStartError,
)
from nemo_rl.venvs import list_venvs

COMMANDS = "sample_environments.Commands"
SOURCES = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}


@pytest.fixture(scope="module", autouse=True)
def ray_local() -> Iterator[None]:
    start_local_ray(num_cpus=2, num_gpus=0)
    yield
    ray.shutdown()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., EnvironmentGroup]]:
    groups: list[EnvironmentGroup] = []

    def make(fqn: str = COMMANDS, **options: Any) -> EnvironmentGroup:
        options = {"runtime_env": SOURCES, **options}
        groups.append(EnvironmentGroup("game", fqn, {"directory": str(tmp_path)}, **options))
        return groups[-1]

    yield make
    for group in groups:
        group.shutdown()


def replies(group: EnvironmentGroup, count: int) -> dict[int, list[Reply]]:
    """Return the next replies by the id of their episode."""
    arrived = next_replies(group, count)
    assert len(arrived) == count
    found: dict[int, list[Reply]] = {}
    for reply in arrived:
        found.setdefault(reply.episode, []).append(reply)
    return found


def call(group: EnvironmentGroup, *requests: Request) -> list[Reply]:
    """Submit calls of one episode and return their replies."""
    group.submit(requests)
    count = sum(request.method != "close" for request in requests)
    return replies(group, count)[requests[0].episode]


def process_of(reset: Reply) -> int:
    assert reset.value is not None, reset.failure
    return int(reset.value["messages"][0]["content"].removeprefix("process "))


def test_resources_that_no_node_has(start) -> None:
    for options, needed in (({"num_gpus": 1}, "1 GPU"), ({"num_cpus": 1, "resources": {"tpu": 0.5}}, "1 CPU, 0.5 tpu")):
        group = start(**options)
        with pytest.raises(ResourceInsufficientError, match=f"needs {needed} on one node, and no node"):
            group.wait_ready()


def test_resources_are_reserved(start) -> None:
    start(num_cpus=1).wait_ready()
    while ray.available_resources().get("CPU") != 1:  # Ray counts with a delay
        time.sleep(0.1)


def test_two_replicas(start, tmp_path: Path) -> None:
    group = start(num_replicas=2)
    group.wait_ready()
    records = group.attestation()
    workers = {record["pid"] for record in records}
    assert len(workers) == 2
    assert {record["verdict"] for record in records} == {"ok"}

    # The episodes are balanced, and stay where they are.
    group.submit([Request(episode, "reset", {}) for episode in range(8)])
    places = {episode: process_of(found[0]) for episode, found in replies(group, 8).items()}
    assert sorted(places.values()) == sorted([*workers] * 4)
    group.submit([Request(episode, "step", f"echo {text}") for text in "abc" for episode in range(8)])
    for episode, found in replies(group, 24).items():
        values = [reply.value for reply in found]
        assert [value["messages"][0]["content"] for value in values] == ["a", "b", "c"]
        assert {value["info"]["pid"] for value in values} == {places[episode]}

    # Without GPUs of its own, it sees none.
    (gpus,) = call(group, Request(0, "step", "variable CUDA_VISIBLE_DEVICES"))
    assert gpus.value is not None
    assert gpus.value["messages"][0]["content"] == "''"

    # What an environment does wrong fails a call; the episode is retried by the other replica.
    failed, nonsense = call(group, Request(0, "step", "fail now"), Request(0, "step", "nonsense"))
    assert failed.failure == f"{COMMANDS}.step raised RuntimeError: now"
    assert "step returned {'reward': 1}" in str(nonsense.failure)
    (retried,) = call(group, Request(0, "reset", {}))
    assert process_of(retried) == next(iter(workers - {places[0]}))

    # A killed replica fails the calls that it runs; the others continue, and it is replaced.
    other = next(episode for episode in range(2, 8) if places[episode] != places[1])
    group.submit([Request(episode, "step", f"wait_for step{episode}") for episode in (1, other)])
    wait_for(lambda: all((tmp_path / f"step{episode}.started").exists() for episode in (1, other)))
    os.kill(places[1], signal.SIGKILL)
    (lost,) = replies(group, 1)[1]
    assert f"the worker of {COMMANDS}.step has ended:" in str(lost.failure)
    (later,) = call(group, Request(1, "step", "echo x"))
    assert "step of env.game was not called: the worker of the episode has ended" in str(later.failure)
    (tmp_path / f"step{other}").touch()
    assert replies(group, 1)[other][0].value["reward"] == 1.0
    (retried,) = call(group, Request(1, "reset", {}))
    assert process_of(retried) == places[other]
    wait_for(lambda: len(group.attestation()) == 2)
    records = group.attestation()
    assert len({record["pid"] for record in records} - workers) == 1

    # `close` ends an episode without a reply.
    (unknown,) = call(group, Request(1, "close"), Request(1, "step", "echo x"))
    assert "there was no reset" in str(unknown.failure)


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


@pytest.mark.slow  # restarts workers
def test_call_that_takes_too_long(start, tmp_path: Path) -> None:
    group = start(step_timeout_s=3.0, concurrency=2)
    (reset,) = call(group, Request(0, "reset", {}))
    (late,) = call(group, Request(0, "step", "wait_for first"))
    assert late.failure == f"{COMMANDS}.step took longer than env.game.step_timeout_s=3"
    (after,) = call(group, Request(0, "step", "echo x"))
    assert "an earlier call took too long" in str(after.failure)

    # The reply of the late call is dropped, and its place is free again.
    (tmp_path / "first").touch()
    requests = [Request(1, "reset", {}), *(Request(1, "step", f"echo {index}") for index in range(20))]
    group.submit([Request(0, "close"), *requests])
    assert {episode: len(found) for episode, found in replies(group, 21).items()} == {1: 21}

    # A replica all of whose places are taken is replaced.
    group.submit([Request(episode, "reset", {}) for episode in (2, 3)])
    group.submit([Request(episode, "step", "wait_for never") for episode in (2, 3)])
    found = replies(group, 4)
    assert [len(found[episode]) for episode in (2, 3)] == [2, 2]
    assert all("took longer than" in str(found[episode][1].failure) for episode in (2, 3))
    (restarted,) = call(group, Request(2, "reset", {}))
    assert process_of(restarted) != process_of(reset)


@pytest.mark.slow  # restarts workers
def test_more_restarts_than_allowed(start) -> None:
    group = start(max_restarts=0)
    (reset,) = call(group, Request(0, "reset", {}))
    worker = psutil.Process(process_of(reset))
    group.submit([Request(0, "step", "kill")])
    with pytest.raises(EnvironmentFailure, match=r"workers of env.game have ended 1 times, and env.game.max_restarts"):
        replies(group, 2)
    worker.wait(60)


@pytest.mark.slow  # restarts workers
def test_memory_limit_replaces_the_worker(start) -> None:
    group = start(max_restarts=0, memory_limit_mb=700)
    (reset,) = call(group, Request(0, "reset", {}))
    group.submit([Request(0, "step", "fill 900"), Request(0, "step", "wait_for never")])
    *_, last = replies(group, 2)[0]
    assert "more than memory_limit_mb=700" in str(last.failure)
    (retried,) = call(group, Request(0, "reset", {}))
    assert process_of(retried) != process_of(reset)


def test_environment_that_does_not_exist(start) -> None:
    group = start("sample_environments.NoSuchGame")
    with pytest.raises(EnvironmentFailure, match="env.game.class=sample_environments.NoSuchGame: .* has no 'NoSuch"):
        group.wait_ready()
    with pytest.raises(EnvironmentFailure, match="env.game cannot be started"):
        group.collect(timeout_s=60)


def test_shutdown_during_the_start(start) -> None:
    group = start()
    group.shutdown()
    group.shutdown()
    with pytest.raises(WorkerStartError, match="worker env.game-0 was stopped while it started"):
        group.wait_ready()


@pytest.mark.slow  # restarts workers
def test_shutdown_ends_the_worker(start) -> None:
    group = start()
    (reset,) = call(group, Request(0, "reset", {}))
    worker = psutil.Process(process_of(reset))
    group.shutdown()
    worker.wait(60)


def make_wheel(directory: Path, module: str) -> Path:
    info = f"{module}-1.0.dist-info"
    files = {
        f"{module}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    wheel = directory / f"{module}-1.0-py3-none-any.whl"
    hashes = {
        path: base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        for path, content in files.items()
    }
    record = [f"{path},sha256={hashes[path]},{len(content)}" for path, content in files.items()]
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,"]) + "\n")
    return wheel


@pytest.mark.slow  # builds a venv with another Python
def test_own_process_with_another_python(
    start, bare_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "venvs"))
    wheel = make_wheel(tmp_path, "only_in_the_child")
    runtime_env = {**SOURCES, "uv": [f"only_in_the_child @ {wheel.as_uri()}"]}
    group = start(own_process=True, py_executable=bare_python, runtime_env=runtime_env, max_restarts=1)
    reset, python, has_module, has_numpy = call(
        group,
        Request(0, "reset", {}),
        *(Request(0, "step", action) for action in ("python", "has only_in_the_child", "has numpy")),
    )
    assert [has_module.value["reward"], has_numpy.value["reward"]] == [1.0, 0.0]
    (record,) = group.attestation()
    assert record["executable"] == sys.executable
    assert record["child"]["pid"] == process_of(reset)
    [built] = list_venvs()
    assert record["child"]["venv_digest"].startswith(built.digest)
    version = ".".join(record["child"]["python"].split(".")[:2])
    assert python.value["messages"][0]["content"] == f"{version} False"
    (killed,) = call(group, Request(0, "step", "kill"))
    assert f"the process of {COMMANDS} (pid {process_of(reset)}) was killed by SIGKILL" in str(killed.failure)
    (retried,) = call(group, Request(0, "reset", {}))
    assert process_of(retried) != process_of(reset)


def test_child_in_another_venv_is_refused(start, bare_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(*arguments: Any) -> WorkerPython:
        return replace(prepare_child_python(*arguments), digest="0" * 64)

    monkeypatch.setattr(replica_start, "prepare_child_python", prepared)
    group = start(own_process=True, py_executable=bare_python)
    with pytest.raises(AttestationError, match=r"the process of env.game .* venv_digest: expected 0+, found None"):
        group.wait_ready()


def test_python_of_ray_for_a_child_is_refused(start) -> None:
    with pytest.raises(RuntimeEnvError, match="Use pip, uv or py_executable instead of conda"):
        start(own_process=True, runtime_env={"conda": ["numpy"]})
