"""Environments that the embedded chat model can learn: a game of several turns, and a task that needs a tool."""

from __future__ import annotations

import re
from typing import Any

from nemo_rl.data import dialogues
from nemo_rl.environments.episode import Environment, Turn
from nemo_rl.environments.tools.tool_environment import ToolEnvironment

_GUESS = re.compile(r"\s*(\d{1,9})\s*")
# The context of the embedded chat model is short, and so must be messages about wrong calls.
_MAX_OUTPUT_CHARS = 40


class GuessNumber(Environment):
    """Answers each guess of a number by "Higher." or "Lower.". The reward is 1 for the right number in time.

    Who halves the range that is left always wins. Who ignores the answers wins at most `max_guesses` of `highest`
    games. An action that is not a number ends the game. The metrics are `won` and `guesses`.

    Example:
        >>> game = GuessNumber()
        >>> game.reset({"seed": 1})
        'Guess a number from 1 to 20'
        >>> game.step("10").observation
        'Lower.'
        >>> game.step("5").reward
        1.0

    Args:
        highest: The number is from 1 to `highest`.
        max_guesses: Guesses of one game. None: one more than halving needs.
    """

    def __init__(self, highest: int = 20, max_guesses: int | None = None) -> None:
        self._highest = highest
        self._max_guesses = dialogues.num_guesses(highest) if max_guesses is None else max_guesses
        self._secret = 0
        self._guesses = 0

    def reset(self, problem: dict[str, Any]) -> str:
        """Begin a game whose number follows from the problem's seed."""
        self._secret = dialogues.secret_number(problem["seed"], self._highest)
        self._guesses = 0
        return dialogues.guessing_prompt(self._highest)

    def step(self, action: str) -> Turn:
        """Answer a guess."""
        self._guesses += 1
        guess = _GUESS.fullmatch(action)
        won = guess is not None and int(guess[1]) == self._secret
        if guess is None or won or self._guesses >= self._max_guesses:
            return Turn(float(won), done=True, info={"won": won, "guesses": self._guesses})
        return Turn(observation=dialogues.feedback(int(guess[1]), self._secret))


class Multiplication(ToolEnvironment):
    """Asks for a product that is too large for a small model, and offers a calculator.

    The reward is 1 for the right product as the final answer. The metrics are those of `ToolEnvironment`.

    Example:
        >>> episode = Multiplication()
        >>> episode.reset({"seed": 1})
        '337*86'
        >>> call = '<tool_call>{"name": "calculator", "arguments": {"expression": "337*86"}}</tool_call>'
        >>> episode.step(call).observation
        [{'role': 'tool', 'content': '28982', 'name': 'calculator'}]
        >>> episode.step("28982").reward
        1.0
    """

    def __init__(self) -> None:
        super().__init__(["calculator"], max_output_chars=_MAX_OUTPUT_CHARS)

    def reset(self, problem: dict[str, Any]) -> str:
        """Begin an episode whose factors follow from the problem's seed."""
        super().reset(problem)
        return dialogues.product_prompt(problem["seed"])

    def score(self, text: str, problem: dict[str, Any]) -> float:
        """Return 1 if the answer is the product."""
        first, second = dialogues.factors(problem["seed"])
        return float(text == str(first * second))
