"""Environments that tests run in other processes, perhaps of another Python: the standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nemo_rl.environments.episode import Environment, Turn


class Commands(Environment):
    """Does what the action says."""

    def __init__(self, directory: str = "") -> None:
        self.directory = Path(directory)

    def reset(self, problem: dict[str, Any]) -> str:
        self.problem = problem
        if problem.get("hold"):
            self.wait_for(problem["hold"])
        return f"process {os.getpid()}"

    def step(self, action: str) -> Turn:
        command, _, argument = action.partition(" ")
        return getattr(self, command)(argument)

    def echo(self, argument: str) -> Turn:
        return Turn(reward=1.0, observation=argument, info={"pid": os.getpid()})

    def python(self, argument: str) -> Turn:
        return Turn(observation=f"{sys.version_info[0]}.{sys.version_info[1]} {'ray' in sys.modules}")

    def has(self, argument: str) -> Turn:
        try:
            __import__(argument)
        except ImportError:
            return Turn(reward=0.0, observation="no")
        return Turn(reward=1.0, observation="yes")

    def variable(self, argument: str) -> Turn:
        return Turn(observation=repr(os.environ.get(argument)))

    def fail(self, argument: str) -> Turn:
        raise RuntimeError(argument)

    def nonsense(self, argument: str) -> Any:
        return {"reward": 1}

    def not_json(self, argument: str) -> Turn:
        return Turn(observation=[{"role": "user", "content": {1, 2}}])

    def kill(self, argument: str) -> Turn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def exit(self, argument: str) -> Turn:
        os._exit(int(argument))

    def noise(self, argument: str) -> Turn:
        print("print")
        os.write(1, b"\x00\x00\x00\x01write to descriptor 1\n")
        subprocess.run(["echo", "child"], check=True)
        return Turn(observation=repr(sys.stdin.read()))

    def wait_for(self, argument: str) -> Turn:
        (self.directory / f"{argument}.started").touch()
        while not (self.directory / argument).exists():
            time.sleep(0.02)
        return Turn(reward=1.0, observation="waited")

    def sleep_in_child(self, argument: str) -> Turn:
        return Turn(observation=str(subprocess.Popen(["sleep", "600"]).pid))

    def fill(self, argument: str) -> Turn:
        HELD.append(bytearray(os.urandom(2**20)) * int(argument))
        return Turn(observation="full")


HELD: list[bytearray] = []


def same(completion: str, answer: str) -> bool:
    return completion == answer
