"""The worker of an environment without Ray: the child process, its protocol, and the memory limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from episode_replies import next_replies

from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.environments.episode_host import EpisodeHost
from nemo_rl.environments.episode_process import EpisodeProcess
from nemo_rl.errors import EnvironmentFailure

SAMPLES = Path(__file__).with_name("sample_environments.py")
COMMANDS = "sample_environments.Commands"


@pytest.fixture
def start(bare_python: str) -> Iterator[Callable[..., EpisodeProcess]]:
    processes: list[EpisodeProcess] = []

    def make(name: str = COMMANDS, **config: Any) -> EpisodeProcess:
        processes.append(EpisodeProcess(bare_python, name, config, concurrency=4))
        return processes[-1]

    yield make
    for process in processes:
        process.shutdown()


def play(runner: Any, *actions: str, episode: int = 0) -> list[Reply]:
    """Return the replies of the steps of a new episode."""
    runner.submit([Request(episode, "reset", {}), *(Request(episode, "step", action) for action in actions)])
    return next_replies(runner, 1 + len(actions))[1:]


def text(reply: Reply) -> str:
    assert reply.failure is None, reply.failure
    assert reply.value is not None
    return reply.value["messages"][0]["content"]


def test_child_runs_in_its_own_python(start) -> None:
    process = start()
    python, has_psutil, has_numpy = play(process, "python", "has psutil", "has numpy")
    assert text(python) == f"{'.'.join(process.description['python'].split('.')[:2])} False"
    assert [text(has_psutil), text(has_numpy)] == ["no", "no"]
    assert process.description["pid"] != os.getpid()


def test_values_survive_the_pipe(start) -> None:
    process = start()
    odd = "\ud800 \x00 é\n" * 20_000
    assert text(play(process, f"echo {odd}")[0]) == odd


def test_scoring_function_in_a_child(start) -> None:
    process = start("sample_environments.same")
    process.submit([Request(0, "reset", {"answer": "4"}), Request(0, "step", "4")])
    assert next_replies(process, 2)[1].value["reward"] == 1.0


def test_output_of_the_environment_does_not_reach_the_pipe(start, capfd: pytest.CaptureFixture[str]) -> None:
    process = start()
    assert text(play(process, "noise")[0]) == "''"
    shown = capfd.readouterr().err
    assert [word in shown for word in ("print", "write to descriptor 1", "child")] == [True] * 3


def test_failures_in_a_child_are_replies(start) -> None:
    process = start()
    failed, nonsense, not_json, later = play(process, "fail now", "nonsense", "not_json", "echo still here")
    assert failed.failure == f"{COMMANDS}.step raised RuntimeError: now"
    assert "Traceback" in failed.details
    assert "step returned {'reward': 1}; return a nemo_rl.environments.episode.Turn" in str(nonsense.failure)
    assert "returned something that is not JSON data" in str(not_json.failure)
    assert text(later) == "still here"


def test_problem_that_is_not_json_is_a_failure(start) -> None:
    process = start()
    process.submit([Request(0, "reset", {"value": {1}})])
    (reply,) = next_replies(process, 1)
    assert reply.failure == (
        f"the argument of {COMMANDS}.reset is not JSON data: Object of type set is not JSON serializable"
    )


@pytest.mark.parametrize(
    ("action", "message"), [("kill", "was killed by SIGKILL"), ("exit 3", "ended with exit code 3")]
)
def test_death_of_the_child_raises(start, action: str, message: str) -> None:
    process = start()
    play(process)
    process.submit([Request(0, "step", action)])
    for _ in range(2):
        with pytest.raises(EnvironmentFailure, match=rf"the process of {COMMANDS} \(pid \d+\) {message}"):
            process.collect(timeout_s=60)
    assert not os.path.exists(process._search_path)


def test_shutdown_ends_the_child_and_its_children(start) -> None:
    process = start()
    grandchild = psutil.Process(int(text(play(process, "sleep_in_child")[0])))
    child = psutil.Process(process.description["pid"])
    process.shutdown()
    assert not child.is_running()
    grandchild.wait(60)


def test_child_ends_with_its_parent(bare_python: str, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from nemo_rl.environments.episode_calls import Request\n"
        "from nemo_rl.environments.episode_process import EpisodeProcess\n"
        f"process = EpisodeProcess({bare_python!r}, {COMMANDS!r}, {{'directory': {str(tmp_path)!r}}})\n"
        "process.submit([Request(0, 'reset', {}), Request(0, 'step', 'wait_for never')])\n"
        "print(process.description['pid'], flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SAMPLES.parent)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    child.wait(60)


@pytest.mark.parametrize(
    ("python", "name", "message"),
    [
        (sys.executable, "no_such_module.Game", "No module named 'no_such_module'"),
        ("/no/such/python", COMMANDS, "cannot be started with /no/such/python"),
        ("/bin/true", COMMANDS, "ended with exit code 0"),
    ],
)
def test_child_that_does_not_start(python: str, name: str, message: str) -> None:
    with pytest.raises(EnvironmentFailure, match=message):
        EpisodeProcess(python, name, {})


def test_worker_over_its_memory_limit_ends() -> None:
    code = (
        "from nemo_rl.environments.environment_worker import EnvironmentWorker, resident_mb\n"
        "from nemo_rl.environments.episode_calls import Request\n"
        "import os, psutil\n"
        "print(resident_mb(os.getpid()), psutil.Process().memory_info().rss / 2**20)\n"
        f"worker = EnvironmentWorker({COMMANDS!r}, {{}}, memory_limit_mb=int(resident_mb(os.getpid())) + 100)\n"
        "worker.open()\n"
        "worker.submit([Request(0, 'reset', {}), Request(0, 'step', 'fill 300')])\n"
        "try:\n"
        "    while True: worker.collect(60)\n"
        "except MemoryError as error: print(error)\n"
        "os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SAMPLES.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    used, expected = map(float, done.stdout.splitlines()[0].split())
    assert used == pytest.approx(expected, rel=0.2)
    assert f"{COMMANDS} used" in done.stdout
    assert "more than memory_limit_mb=" in done.stdout


def test_memory_limit_below_the_start_is_refused() -> None:
    code = (
        "from nemo_rl.environments.environment_worker import EnvironmentWorker\n"
        f"EnvironmentWorker({COMMANDS!r}, {{}}, memory_limit_mb=1).open()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SAMPLES.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "before its first episode; memory_limit_mb=1 is too low" in done.stderr


def test_batch_environment_is_an_episode_with_one_turn() -> None:
    name = "nemo_rl.environments.math_environment.MathEnvironment"
    host = EpisodeHost(name, {"config": {"answer_format": "whole"}})
    problem = {"answer": "1/2", "seed": 0, "prompt": "?"}
    for episode, action in enumerate(["0.5", "2", "???"]):
        host.submit([Request(episode, "reset", problem), Request(episode, "step", action)])
    steps = {reply.episode: reply.value for reply in next_replies(host, 6) if reply.value and "reward" in reply.value}
    assert [steps[episode]["reward"] for episode in range(3)] == [1.0, 0.0, 0.0]
    assert [steps[episode]["info"]["fraction_unparseable"] for episode in range(3)] == [0.0, 0.0, 1.0]
    assert steps[0]["done"]
    later = host._make()
    host.shutdown()
    with pytest.raises(EnvironmentFailure):  # all episodes share one object, which is closed
        later.step("0.5")
