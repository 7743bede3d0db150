"""Episodes whose conversation is scored at their end, by a reward model or a judge.

::

    reset ──► prompt, or the first observation of `environment` ──┐
    step  ──► answer; observations of `environment` ──────────────┴─► conversation ──at the end──► scorer ──► reward
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from nemo_rl.distributed.workers.host import load_object
from nemo_rl.environments.agent import Agent
from nemo_rl.environments.episode import Environment, Message, Observation, Turn
from nemo_rl.environments.episode_host import as_messages, episode_maker, opening_messages
from nemo_rl.environments.scoring_config import ScoredEnvironmentConfig, ScoringConfig
from nemo_rl.environments.tools.coroutines import completed
from nemo_rl.errors import ConfigError, EnvironmentFailure
from nemo_rl.utils.config import validate


@dataclass(frozen=True)
class Conversation:
    """Holds an episode that has ended.

    Attributes:
        problem: What `reset` received.
        messages: All messages, from the prompt to the last answer.
        num_opening: Number of messages before the first answer.
        tools: JSON schemas of the tools that the model saw.
    """

    problem: Mapping[str, Any]
    messages: Sequence[Message]
    num_opening: int
    tools: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Score:
    """Holds the result of a scorer.

    Attributes:
        value: The score.
        info: Metrics of the episode.
        comment: Messages that the report shows behind the conversation. The model never reads them.
    """

    value: float
    info: Mapping[str, float] = field(default_factory=dict)
    comment: Sequence[Message] = ()


class Scorer(Protocol):
    """Scores conversations. One object per worker; its method is called from several threads."""

    def score(self, conversation: Conversation) -> Score:
        """Return the score. An exception is a failure of the environment, never a reward."""


class ScoredEpisode(Environment):
    """One episode whose reward comes from a scorer. Subclasses say which.

    Without `environment` in the configuration, the episode is one answer to the prompt of the problem. With it, the
    episode is one of that environment, and ends when that says so; its own rewards count with `reward_weight`.

    The metrics are `score`, before `scale`, `offset` and `clamp`, with `environment` also `environment_reward`, and
    those of scorer and environment.

    Args:
        config: The configuration.
        scorer: Scores the conversation.
        environment: The episode that is scored; None for one answer.
    """

    config_class: ClassVar[type[ScoringConfig]]

    def __init__(self, config: ScoringConfig, scorer: Scorer, environment: Environment | None) -> None:
        self._config, self._scorer, self._environment = config, scorer, environment
        self._conversation = Conversation({}, [], 0)
        self._environment_reward = 0.0

    @classmethod
    def make_scorer(cls, config: Any) -> Scorer:
        """Return the scorer of a worker. `config` is a checked `config_class`."""
        raise NotImplementedError

    @classmethod
    def episode_factory(cls, **config: Any) -> Callable[[], Environment]:
        """See `Environment.episode_factory`. Raises `ConfigError` for a wrong configuration."""
        checked = validate(cls.config_class, config, where=f"the configuration of {cls.__name__}")
        make_environment = None if checked.environment is None else _maker(checked.environment)
        scorer = cls.make_scorer(checked)
        return lambda: cls(checked, scorer, None if make_environment is None else make_environment())

    def reset(self, problem: dict[str, Any]) -> Observation | None:
        """Begin the episode. Raises `ValueError` if there is nothing to answer."""
        observation: Observation | None = None
        tools: list[dict[str, Any]] = []
        if self._environment is not None:
            observation = completed(self._environment.reset(problem))
            if observation is not None:
                observation = as_messages(observation, "reset")
            tools = list(completed(self._environment.tools()))
        messages = opening_messages(observation, problem)
        if not messages:
            raise ValueError("the problem has no prompt; use a data set with prompts, or set config.environment")
        self._conversation = Conversation(problem, messages, len(messages), tools)
        self._environment_reward = 0.0
        return observation

    def tools(self) -> list[dict[str, Any]]:
        """Return the tools of the environment."""
        return list(self._conversation.tools)

    def step(self, action: str) -> Turn:
        """Answer one action, or score the conversation if the episode has ended."""
        turn = Turn(done=True) if self._environment is None else completed(self._environment.step(action))
        if not isinstance(turn, Turn):
            raise TypeError(f"step returned {turn!r}; return a nemo_rl.environments.episode.Turn")
        observed = [] if turn.observation is None else as_messages(turn.observation, "step")
        messages = [*self._conversation.messages, {"role": "assistant", "content": action}]
        self._conversation = dataclasses.replace(self._conversation, messages=[*messages, *observed])
        reward = turn.reward * (1.0 if self._config.environment is None else self._config.environment.reward_weight)
        self._environment_reward += turn.reward
        if not turn.done:
            return dataclasses.replace(turn, reward=reward)
        # What an environment says behind the last answer is no part of what the model did.
        score = self._scorer.score(dataclasses.replace(self._conversation, messages=messages))
        if not math.isfinite(score.value):
            raise EnvironmentFailure(f"the score is {score.value}; it must be finite")
        info = {**turn.info, **score.info, "score": score.value}
        if self._environment is not None:
            info["environment_reward"] = self._environment_reward
        comment = [*observed, *score.comment]
        reward += self._config.reward(score.value)
        return dataclasses.replace(turn, reward=reward, observation=comment or None, info=info)

    def close(self) -> None:
        """Close the episode of the environment."""
        if self._environment is not None:
            closing: Any = self._environment.close  # it may be a coroutine
            completed(closing())


def _maker(environment: ScoredEnvironmentConfig) -> Callable[[], Environment]:
    """Return what makes the episodes of the environment that is scored. Raises `ConfigError`."""
    name = environment.class_
    target = load_object(name)
    if isinstance(target, type) and issubclass(target, Agent):
        raise ConfigError(
            f"config.environment: {name} is an agent, which has several conversations, so it cannot be scored by "
            "another environment; call the scorer in its method run"
        )
    return episode_maker(name, environment.config)
