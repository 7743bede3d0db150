"""The games of `textarena` for one player, with several turns.

Tested with textarena 0.7.4. It needs no data set: use `data: {train: {kind: seeds}}`. Some games load word lists
through `nltk`, which downloads them at the first use.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import textarena

from nemo_rl.environments.episode import Environment, Turn

_ONE_AT_A_TIME = threading.Lock()


class TextArena(Environment):
    """One game. The reward is that of the game's end.

    The games draw from Python's global random numbers. Each episode has a state of its own for them, so that it depends
    on its seed only; the calls of a worker therefore run one at a time.

    Args:
        game: Id of a game for one player, such as "GuessTheNumber-v0".
        options: Options of the game.
        prompt: What the model reads first. None: the rules of the game, which are long.
        action_format: What the game receives, with `{}` for the action: "[{}]" for a model that writes no brackets.
    """

    def __init__(
        self,
        game: str,
        *,
        options: dict[str, Any] | None = None,
        prompt: str | None = None,
        action_format: str = "{}",
    ) -> None:
        # Only the plain form tells each message once; others repeat the whole history in every observation.
        self._id = game if game.endswith("-raw") else f"{game}-raw"
        self._options = options or {}
        self._prompt, self._action_format = prompt, action_format
        self._random_state: Any = None

    def reset(self, problem: dict[str, Any]) -> str:
        with self._own_random_numbers():
            self._game = textarena.make(self._id, **self._options)
            self._game.reset(num_players=1, seed=problem["seed"] % 2**32)
            rules = self._observation()
        return rules if self._prompt is None else self._prompt

    def step(self, action: str) -> Turn:
        with self._own_random_numbers():
            done, _ = self._game.step(self._action_format.format(action))
            if not done:
                return Turn(observation=self._observation())
            rewards, _ = self._game.close()
        reward = float((rewards or {}).get(0, 0.0))
        return Turn(reward, done=True, info={"won": reward >= 1.0})

    def _observation(self) -> str:
        """Return what the game has said since the last action."""
        player, messages = self._game.get_observation()
        return "\n".join(text for sender, text, _ in messages if sender != player) or "(no message)"

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        with _ONE_AT_A_TIME:
            others = random.getstate()
            if self._random_state is not None:
                random.setstate(self._random_state)
            try:
                yield
            finally:
                self._random_state = random.getstate()
                random.setstate(others)
