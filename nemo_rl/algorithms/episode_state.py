"""The state of one episode: its transcripts, its conversation and its rewards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Why an episode ended. The limits cut it off.
Reason = Literal["done", "truncated", "max_turns", "max_tokens", "timeout_s", "failed"]


@dataclass
class Transcript:
    """Token ids as the model read and sampled them: one row of the training batch.

    Attributes:
        tokens: The tokens.
        turns: For each token, the turn of the episode, from 1, whose action it belongs to. 0 at tokens that are not
            trained on here: those of observations, and actions that an earlier transcript already has.
        logprobs, sampling_logprobs: As in `GenerationResult`; 0 where `turns` is 0.
        num_prompt_tokens: Tokens before the first action.
    """

    tokens: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0

    @property
    def is_trained(self) -> bool:
        """Whether it has an action of its own."""
        return any(self.turns)

    def append(
        self,
        turn: int,
        observation: Sequence[int],
        action: Sequence[int],
        logprobs: Sequence[float],
        sampling_logprobs: Sequence[float],
    ) -> None:
        """Append an observation, and the action that followed it."""
        zeros = [0.0] * len(observation)
        if not self.tokens:
            self.num_prompt_tokens = len(observation)
        self.tokens += [*observation, *action]
        self.turns += [0] * len(observation) + [turn] * len(action)
        self.logprobs += [*zeros, *logprobs]
        self.sampling_logprobs += [*zeros, *sampling_logprobs]

    def beginning(self, length: int) -> Transcript:
        """Return a transcript with the first `length` tokens of this one, none of which it trains on."""
        zeros = [0.0] * length
        return Transcript(self.tokens[:length], [0] * length, zeros.copy(), zeros.copy(), self.num_prompt_tokens)


@dataclass
class Episode:
    """One episode of a rollout.

    Attributes:
        row: Position among the samples of the rollout.
        number: Id for the environment.
        environment: Name of the environment.
        problem: What `reset` receives.
        prompt: Tokens of the problem's own prompt, for environments whose `reset` returns no observation.
        state: Whom it waits for.
        transcripts: One; more if an agent has gone back to an earlier action, or begun another conversation.
        actions: For each action, its transcript and the position behind it.
        pending: Tokens that the model has to read before its next action: an observation, which joins the last
            transcript with this action.
        messages: The conversation as text, for people.
        answer: The last `Turn.answer`.
        usage: See `Request.usage`, of the last action.
        attempts: How often it has begun.
    """

    row: int
    number: int
    environment: str
    problem: dict[str, Any]
    prompt: list[int]
    state: Literal["environment", "ready", "sampling", "ended"] = "environment"
    transcripts: list[Transcript] = field(default_factory=lambda: [Transcript()])
    actions: list[tuple[Transcript, int]] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    info: dict[str, float] = field(default_factory=dict)
    answer: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    environment_s: float = 0.0
    attempts: int = 0
    started: float = 0.0
    ready_since: float = 0.0
    reason: Reason = "done"
    failure: str = ""

    @property
    def num_turns(self) -> int:
        return len(self.actions)

    @property
    def num_tokens(self) -> int:
        """Tokens of all transcripts."""
        return sum(len(transcript.tokens) for transcript in self.transcripts)

    def begin(self) -> None:
        """Forget the attempt before, if there was one."""
        self.transcripts = [Transcript()]
        self.actions, self.pending, self.messages, self.rewards = [], [], [], []
        self.info, self.answer = {}, None
        self.environment_s = 0.0
        self.attempts += 1
        self.started = time.monotonic()
        self.state = "environment"

    def context(self) -> list[int]:
        """Return what the model reads before its next action."""
        return [*self.transcripts[-1].tokens, *self.pending]

    def read(self, tokens: list[int], messages: Sequence[dict[str, Any]], *, continues: int | None) -> None:
        """Set what the model reads next.

        Args:
            tokens: The observation.
            messages: The same as text.
            continues: The action, from 0, that the observation follows. None: it begins a conversation.
        """
        self.pending = tokens
        branch = ""
        if continues is None:
            if self.actions:
                branch = "a new conversation"
                self.transcripts.append(Transcript())
        else:
            transcript, end = self.actions[continues]
            if transcript is not self.transcripts[-1] or end < len(transcript.tokens):
                branch = f"continues turn {continues + 1}"
                self.transcripts.append(transcript.beginning(end))
        shown = [dict(message) for message in messages]
        if branch and shown:
            shown[0]["branch"] = branch
        self.messages += shown

    def act(
        self, action: Sequence[int], logprobs: Sequence[float], sampling_logprobs: Sequence[float], text: str
    ) -> None:
        """Append what was read and the action that was sampled to the last transcript."""
        transcript = self.transcripts[-1]
        transcript.append(self.num_turns + 1, self.pending, action, logprobs, sampling_logprobs)
        self.actions.append((transcript, len(transcript.tokens)))
        self.pending = []
        self.messages.append({"role": "assistant", "content": text})


def record(episode: Episode, counted: bool) -> dict[str, Any]:
    """Return what is kept of an episode for people, as JSON data."""
    return {
        "environment": episode.environment,
        "problem": episode.problem["seed"],
        "sample": episode.row,
        "reward": None if episode.reason == "failed" else sum(episode.rewards),
        "turns": episode.num_turns,
        "tokens": len(episode.transcripts[0].tokens),
        "end": episode.reason,
        "outcome": "trained" if counted else "masked",
        "failure": episode.failure,
        "attempts": episode.attempts,
        "messages": [dict(message) for message in episode.messages],
    }


def metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return the metrics of all episodes, and those of each environment with its name and a slash before them."""
    measured = _metrics_of(episodes)
    for name in sorted({episode.environment for episode in episodes}):
        chosen = [episode for episode in episodes if episode.environment == name]
        measured |= {f"{name}/{key}": value for key, value in _metrics_of(chosen).items()}
    return measured


def _metrics_of(episodes: Sequence[Episode]) -> dict[str, float]:
    valid = [episode for episode in episodes if episode.reason != "failed"]
    measured = {
        "failed": 1.0 - len(valid) / len(episodes),
        "retried": sum(episode.attempts - 1 for episode in episodes) / len(episodes),
    }
    if not valid:
        return measured
    turns = sum(episode.num_turns for episode in valid)
    measured |= {
        "reward": sum(sum(episode.rewards) for episode in valid) / len(valid),
        "turns": turns / len(valid),
        "cut_off": sum(episode.reason != "done" for episode in valid) / len(valid),
        "step_s": sum(episode.environment_s for episode in valid) / max(turns, 1),
    }
    transcripts = sum(len(episode.transcripts) for episode in valid)
    if transcripts > len(valid):
        measured["transcripts"] = transcripts / len(valid)
    names = {name for episode in valid for name in episode.info}
    for name in sorted(names):
        values = [episode.info[name] for episode in valid if name in episode.info]
        measured[name] = sum(values) / len(values)
    return measured
