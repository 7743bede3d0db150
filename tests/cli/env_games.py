"""Environments that the tests of `nemo-rl env` run in child processes, right and wrong ones."""

from __future__ import annotations

import itertools
import os
import random
import time
from importlib import import_module
from typing import Any

from nemo_rl.environments.episode import Environment, Turn

_COUNTER = itertools.count()


class Guess(Environment):
    """The right one: guess a number from feedback."""

    def __init__(self, high: int = 9, max_guesses: int = 5) -> None:
        self.high, self.left = high, max_guesses

    def reset(self, problem: dict[str, Any]) -> str:
        self.number = random.Random(problem["seed"]).randint(0, self.high)
        return f"Game {problem['seed']}: guess my number from 0 to {self.high}."

    def step(self, action: str) -> Turn:
        self.left -= 1
        guess = int(action) if action.isdecimal() else -1
        if guess == self.number:
            return Turn(reward=1.0, done=True, info={"won": 1.0})
        if not self.left:
            return Turn(observation="lost", done=True)
        return Turn(observation="too low" if guess < self.number else "too high")

    def tools(self) -> list[dict[str, Any]]:
        return [{"name": "guess"}]


class Unseeded(Guess):
    def reset(self, problem: dict[str, Any]) -> str:
        return f"{super().reset(problem)} {next(_COUNTER)}"


class UnseededTurns(Guess):
    def step(self, action: str) -> Turn:
        return Turn(observation=str(next(_COUNTER)))


class SameForAll(Guess):
    def reset(self, problem: dict[str, Any]) -> str:
        super().reset(problem)
        return "Guess."


class Strict(Guess):
    def step(self, action: str) -> Turn:
        return Turn(reward=float(int(action) == self.number), done=True)


class NotANumber(Guess):
    def step(self, action: str) -> Turn:
        return Turn(reward=float("nan"), done=True)


class NotText(Guess):
    def reset(self, problem: dict[str, Any]) -> Any:
        return [{"role": "user", "content": 5}]


class Endless(Guess):
    def step(self, action: str) -> Turn:
        return Turn(observation="go on")


class Slow(Guess):
    def step(self, action: str) -> Turn:
        time.sleep(1)
        raise AssertionError


class Dies(Guess):
    def step(self, action: str) -> Turn:
        os._exit(3)


class NoStep:
    def reset(self, problem: dict[str, Any]) -> str:
        return "start"


class Variable(Guess):
    def reset(self, problem: dict[str, Any]) -> str:
        super().reset(problem)
        return os.environ["GAME"]


class NeedsAlpha(Guess):
    def reset(self, problem: dict[str, Any]) -> str:
        import_module("alpha")
        return super().reset(problem)


def same(completion: str, answer: str) -> float:
    return float(completion == answer)
