"""A language model as a judge: it is asked for a score of the conversation, over an OpenAI-compatible API."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import openai

from nemo_rl import settings
from nemo_rl.environments.episode import Message
from nemo_rl.environments.scoring import Conversation, Score, ScoredEpisode
from nemo_rl.environments.scoring_config import JudgeConfig
from nemo_rl.errors import ConfigError, EnvironmentFailure

_END_OF_THINKING = "</think>"
_MAX_SEED = 2**31
_MAX_SHOWN = 200


class Judge(ScoredEpisode):
    """One episode that a language model scores at its end. See `ScoredEpisode` and `JudgeConfig`.

    The placeholders of the template are `{problem}` (what the model read first), `{answer}` (its last message, without
    what precedes `</think>`), `{reference}` (the expected answer of the problem) and `{conversation}` (all messages).

    An answer of the judge without a readable score is a failure, never a reward. The metric is `asks`, the number of
    answers until the score was readable. The answer itself is a message of the role `judge` in the report.
    """

    config_class = JudgeConfig

    @classmethod
    def make_scorer(cls, config: JudgeConfig) -> JudgeScorer:
        """See `ScoredEpisode.make_scorer`."""
        return JudgeScorer(config)


class JudgeScorer:
    """Asks the judge. Thread-safe; the threads share connections.

    Raises:
        ConfigError: The variable with the key is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._key = ""
        if config.api_key_variable is not None:
            self._key = settings.snapshot().get(config.api_key_variable, "")
            if not self._key:
                raise ConfigError(f"the variable {config.api_key_variable}, which holds the judge's key, is not set")
        self._client = openai.OpenAI(
            base_url=config.base_url,
            api_key=self._key or "none",  # the client requires one
            timeout=config.timeout_s,
            max_retries=config.max_retries,
        )

    def score(self, conversation: Conversation) -> Score:
        """Return the score.

        Raises:
            EnvironmentFailure: The judge does not answer, or no answer has a readable score.
            ValueError: The template has `{reference}`, and the problem has no expected answer.
        """
        config, prompt = self._config, self._prompt(conversation)
        seed = int(conversation.problem.get("seed", 0))
        reason = ""
        for ask in range(config.max_asks):
            verdict = self._ask(prompt, (seed + ask) % _MAX_SEED)
            try:
                value = read_score(config, verdict)
            except ValueError as error:
                reason = str(error)
            else:
                return Score(value, {"asks": ask + 1}, [{"role": "judge", "content": verdict}])
        raise EnvironmentFailure(f"the judge {config.model} gave no score in {config.max_asks} answers: {reason}")

    def _prompt(self, conversation: Conversation) -> str:
        reference = str(conversation.problem.get("answer") or "")
        if self._config.uses("reference") and not reference:
            raise ValueError("the template has {reference}, but the problem has no expected answer")
        messages = conversation.messages
        return self._config.prompt(
            {
                "problem": _as_text(messages[: conversation.num_opening]),
                "answer": str(messages[-1]["content"]).rpartition(_END_OF_THINKING)[2].strip(),
                "reference": reference,
                "conversation": _as_text(messages),
            }
        )

    def _ask(self, prompt: str, seed: int) -> str:
        config = self._config
        fields = {"seed": seed, **config.options} if config.sends_seed else config.options
        try:
            reply: Any = self._client.chat.completions.create(
                model=config.model, messages=[{"role": "user", "content": prompt}], extra_body=fields
            )
        except openai.OpenAIError as error:
            cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
            reason = " ".join(f"{error}{cause}".split())
            if self._key:
                reason = reason.replace(self._key, settings.MASK)
            raise EnvironmentFailure(f"the judge at {config.base_url} does not answer: {reason}") from None
        return str(reply.choices[0].message.content or "") if reply.choices else ""


def read_score(config: JudgeConfig, verdict: str) -> float:
    """Return the score in an answer of the judge. What precedes `</think>` is ignored.

    Raises:
        ValueError: There is none, or it is outside of `score_range`.

    Example:
        >>> config = JudgeConfig(base_url="http://host/v1", model="judge", template="{answer}", pattern="Score: ([01])")
        >>> read_score(config, "It could be Score: 0, but it is right. Score: 1")
        1.0
    """
    text = verdict.rpartition(_END_OF_THINKING)[2]
    if config.pattern is not None:
        matches = re.findall(config.pattern, text)
        value, where = (matches[-1], "") if matches else (None, f"the pattern {config.pattern!r}")
    else:
        assert config.json_field is not None
        value, where = _last_field(text, config.json_field), f"a JSON object with the field {config.json_field!r}"
    if value is None:
        raise ValueError(f"{where} is not in {_shown(verdict)}")
    if config.verdicts is not None:
        scores = {word.casefold(): score for word, score in config.verdicts.items()}
        word = str(value).strip().casefold()
        if word not in scores:
            raise ValueError(f"{_shown(str(value))} is none of {', '.join(config.verdicts)}")
        return scores[word]
    try:
        score = float(str(value))
    except ValueError:
        raise ValueError(f"{_shown(str(value))} is no number") from None
    low, high = config.score_range
    if not low <= score <= high:
        raise ValueError(f"{score:g} is outside of score_range, {low:g} to {high:g}")
    return score


def _last_field(text: str, field: str) -> Any:
    """Return the value of a field of the last JSON object that has it; None if there is none."""
    decoder = json.JSONDecoder()
    result = None
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            result = value.get(field, result)
        position = text.find("{", end)
    return result


def _as_text(messages: Sequence[Message]) -> str:
    """Return messages as text: the content of one message, or role and content of several."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
