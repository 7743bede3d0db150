"""The guessing game of `nemo_rl.environments.games`, written with the base classes of openenv.

It is an example, and part of `grpo_many_environments.yaml`: its texts are those that the embedded chat model knows.
openenv serves it to other machines, too::

    app = create_fastapi_app(GuessNumber, Guess, Answer, max_concurrent_envs=64)
"""

from __future__ import annotations

import random
from typing import Any

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

from nemo_rl.data import dialogues


class Guess(Action):
    """Holds one guess."""

    number: int


class Answer(Observation):
    """Holds what the player reads."""

    message: str


class GuessNumber(Environment[Guess, Answer, State]):
    """Answers each guess of a number by "Higher." or "Lower.". The reward is 1 for the right number in time."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, highest: int = 20) -> None:
        super().__init__()
        self._highest = highest
        self._secret = 0
        self._state = State()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Answer:
        """Begin a game whose number follows from the seed."""
        seed = random.getrandbits(32) if seed is None else seed
        self._secret = dialogues.secret_number(seed, self._highest)
        self._state = State(episode_id=episode_id)
        return Answer(message=dialogues.guessing_prompt(self._highest))

    def step(self, action: Guess, timeout_s: float | None = None, **kwargs: Any) -> Answer:
        """Answer a guess."""
        self._state.step_count += 1
        if action.number == self._secret:
            return Answer(message="Right.", reward=1.0, done=True)
        is_last = self._state.step_count >= dialogues.num_guesses(self._highest)
        return Answer(message=dialogues.feedback(action.number, self._secret), reward=0.0, done=is_last)

    @property
    def state(self) -> State:
        """Return how many guesses there were."""
        return self._state
