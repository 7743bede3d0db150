"""Prepares the episodes of a run for the report: conversations, how they ended, and what was left out of training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_rl.observability.rollout_files import message_text
from nemo_rl.utils.text import printable

_MAX_EPISODES = 24
_MAX_MESSAGES = 60
_MAX_CHARS = 4000
_MAX_REASONS = 3
_TOOL_CALL = re.compile(r"(<tool_call>.*?(?:</tool_call>|\Z))", re.DOTALL)
_ENDS = {
    "done": "ended by the environment",
    "truncated": "cut off by the environment",
    "max_turns": "cut off at max_turns",
    "max_tokens": "cut off at max_tokens",
    "timeout_s": "cut off at timeout_s",
    "failed": "failed",
}


@dataclass(frozen=True)
class Part:
    """Holds a piece of a message's text; `is_call` marks the call of a tool."""

    text: str
    is_call: bool


@dataclass(frozen=True)
class Message:
    """Holds a message of a conversation.

    Attributes:
        branch: Where it branches off, if it does not follow the message before; else empty.
        reward: That of an action, else None.
    """

    role: str
    name: str
    branch: str
    parts: list[Part]
    reward: float | None


@dataclass(frozen=True)
class Episode:
    """Holds an episode: its conversation, how it ended, and why it is left out of training, or an empty text."""

    step: int
    reward: float | None
    num_turns: int
    end: str
    masked: str
    messages: list[Message]
    num_hidden: int


@dataclass(frozen=True)
class Conversations:
    """Holds the episodes of one environment."""

    environment: str
    episodes: list[Episode]


@dataclass
class Account:
    """Counts what became of the training episodes of one environment."""

    environment: str
    num_episodes: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    num_repeated: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def reasons_text(self) -> str:
        """Why episodes were masked, the most frequent reasons first."""
        return "; ".join(f"{reason} ({count:,})" for reason, count in self.reasons.most_common(_MAX_REASONS))


def accounts(records: Iterable[Mapping[str, Any]]) -> list[Account]:
    """Count the records of `Logger.log_episodes` by environment."""
    by_name: dict[str, Account] = {}
    for record in records:
        name = _text_of(record, "environment")
        account = by_name.setdefault(name, Account(name))
        outcome = str(record.get("outcome", "")).partition(":")[0]
        account.num_episodes += 1
        account.outcomes[outcome] += 1
        account.num_repeated += (record.get("attempts") or 1) > 1
        if outcome == "masked":
            account.reasons[_why_masked(record)] += 1
    return [account for _, account in sorted(by_name.items())]


def conversations(records: Sequence[Mapping[str, Any]]) -> list[Conversations]:
    """Return, by environment, the episodes of the first and the last step that logged some."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if isinstance(record.get("step"), int) and isinstance(record.get("messages"), list):
            by_name.setdefault(_text_of(record, "environment"), []).append(record)
    groups = []
    for name, chosen in sorted(by_name.items()):
        steps = [record["step"] for record in chosen]
        episodes = [
            _episode(record)
            for step in sorted({min(steps), max(steps)})
            for record in [record for record in chosen if record["step"] == step][:_MAX_EPISODES]
        ]
        groups.append(Conversations(name, episodes))
    return groups


def shortened(text: str) -> str:
    """Replace unprintable characters and shorten long text. A completion may contain any character."""
    text = printable(text)
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + " …"


def _text_of(record: Mapping[str, Any], key: str) -> str:
    return shortened(str(record.get(key) or ""))


def _end(record: Mapping[str, Any]) -> str:
    end = _text_of(record, "end")
    return _ENDS.get(end, end)


def _why_masked(record: Mapping[str, Any]) -> str:
    return (_text_of(record, "failure") if record.get("end") == "failed" else "") or _end(record)


def _episode(record: Mapping[str, Any]) -> Episode:
    end = str(record.get("end", ""))
    messages = [message for message in record["messages"] if isinstance(message, dict)]
    return Episode(
        step=record["step"],
        reward=None if end == "failed" else record.get("reward"),
        num_turns=sum(message.get("role") == "assistant" for message in messages),
        end=_end(record),
        masked=f"masked: {_why_masked(record)}" if record.get("outcome") == "masked" else "",
        messages=[_message(message) for message in messages[:_MAX_MESSAGES]],
        num_hidden=max(len(messages) - _MAX_MESSAGES, 0),
    )


def _message(message: Mapping[str, Any]) -> Message:
    parts = list(_parts(message))
    branch = f"({message['branch']})" if message.get("branch") else ""
    return Message(_text_of(message, "role"), _text_of(message, "name"), branch, parts, message.get("reward"))


def _parts(message: Mapping[str, Any]) -> Iterator[Part]:
    """Split a message into text and calls: those that it lists, and those of an action in `<tool_call>` tags."""
    text = message_text({"content": message.get("content")})
    for piece in _TOOL_CALL.split(text) if message.get("role") == "assistant" else [text]:
        if piece.strip():
            yield Part(shortened(piece.strip("\n")), piece.startswith("<tool_call>"))
    for call in message.get("tool_calls") or ():
        yield Part(shortened(message_text({"tool_calls": [call]})), is_call=True)
