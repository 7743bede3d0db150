"""The protocol of an environment with turns: what its author writes, and the plain data that it returns.

An episode is one attempt at one problem::

    problem ──► reset ──► observation ──► the model samples an action ──► step ──► turn ──► ... until done

The module imports nothing but the standard library, and runs on every Python from 3.10 on: an environment may live in a
venv without torch, ray, or the packages of the training job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
# What the model reads next: text, which becomes one message of the role `user`, or chat messages.
Observation = str | list[Message]


@dataclass(frozen=True)
class Turn:
    """Holds what a step returns.

    Attributes:
        reward: Reward of this turn, a finite number. The reward of an episode is the sum over its turns.
        observation: What the model reads before its next action; required unless the episode has ended.
        done: Whether the episode has ended.
        truncated: Whether the environment cut the episode off, so that its reward does not tell how good it was.
        info: Numbers by name, such as `{"won": 1.0}`. Their means over the episodes become metrics; of an episode, the
            last value of each name counts.
        answer: What the model has answered, as text, for the majority vote of evaluations. Of an episode, the last one
            counts. None: there is none.
    """

    reward: float = 0.0
    observation: Observation | None = None
    done: bool = False
    truncated: bool = False
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)
    answer: str | None = None


class Environment:
    """One episode. The worker makes an object for each episode, with the keyword arguments of `env.<name>.config`.

    All methods may be coroutines (`async def`). Methods of different episodes run at the same time, up to
    `env.<name>.concurrency`; those of one episode run one after another. Objects that episodes share, such as an index
    or a connection, belong in a `functools.cache`d function of the module.

    An exception is a failure of the environment, never a reward: the episode is repeated with the same seed, by another
    worker if there is one. What takes long to load and serves all episodes, such as a model, belongs in
    `episode_factory`.

    Example:
        >>> class Doubling(Environment):
        ...     def reset(self, problem):
        ...         self.number = problem["seed"] % 10
        ...         return f"Double {self.number}."
        ...
        ...     def step(self, action):
        ...         return Turn(reward=float(action.strip() == str(2 * self.number)), done=True)
        >>> episode = Doubling()
        >>> episode.reset({"seed": 3})
        'Double 3.'
        >>> episode.step("6").reward
        1.0
    """

    @classmethod
    def episode_factory(cls, **config: Any) -> Callable[[], Environment]:
        """Return a function that makes the object of an episode. Called once in each worker, when it starts.

        An exception ends the job before its first step.

        Args:
            config: `env.<name>.config`.
        """
        return lambda: cls(**config)

    def reset(self, problem: dict[str, Any]) -> Observation | None:
        """Begin the episode.

        Args:
            problem: The fields of the data set's record, with the prompt as `prompt` and the expected answer as
                `answer`, and an integer `seed`. All random numbers of an episode must follow from the problem. The
                episodes of one group have equal problems, and must begin with equal observations.

        Returns:
            What the model reads first. None: the problem's prompt.
        """
        return None

    def step(self, action: str) -> Turn:
        """Answer one action.

        Args:
            action: The text that the model sampled, without special tokens.
        """
        raise NotImplementedError

    def tools(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools that the chat template shows to the model. Called after `reset`."""
        return []

    def close(self) -> None:
        """Release what the episode holds. Called once, also after a failure."""
