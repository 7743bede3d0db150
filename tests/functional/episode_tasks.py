"""Environments of the functional tests. A job finds them by PYTHONPATH."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

from nemo_rl.environments.episode import Environment, Turn


class TwoSums(Environment):
    """Two sums, one after another; half a reward for each.

    Args:
        failure_rate: Share of the steps that raise.
        kill_dir: Each file in this directory kills one worker: the step that removes it ends its process.
        step_s: Time that a step takes.
        step_dir: Each step creates a file in this directory, named after its process, when it begins.
    """

    def __init__(
        self,
        failure_rate: float = 0.0,
        kill_dir: str | None = None,
        step_s: float = 0.0,
        step_dir: str | None = None,
    ) -> None:
        self.failure_rate, self.kill_dir, self.step_s, self.step_dir = failure_rate, kill_dir, step_s, step_dir

    def reset(self, problem: dict[str, Any]) -> str:
        self.random, self.turns = random.Random(problem["seed"]), 0
        return self.question()

    def question(self) -> str:
        first, second = self.random.randint(1, 9), self.random.randint(1, 9)
        self.answer = str(first + second)
        return f"{first}+{second}="

    def step(self, action: str) -> Turn:
        if self.step_dir is not None:
            Path(self.step_dir, str(os.getpid())).touch()
        time.sleep(self.step_s)
        if random.random() < self.failure_rate:
            raise ConnectionError("the task server does not answer")
        for file in Path(self.kill_dir).iterdir() if self.kill_dir else ():
            file.unlink(missing_ok=True)
            os._exit(1)
        self.turns += 1
        right = action.strip() == self.answer
        return Turn(0.5 * right, "\n" + self.question(), done=self.turns == 2, info={"right": right})


def exact(completion: str, answer: str) -> float:
    """Score a completion that is only the answer."""
    return float(completion.strip() == answer)
