"""Preference pairs, from files, from Hugging Face and from the embedded generator: two answers, of which one is better.

A record is a prompt with two answers, all as text or all as chat messages, or two conversations that begin with the
same messages. Those are the prompt::

    {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    {"prompt": [{"role": "user", "content": "2+2?"}],
     "chosen": [{"role": "assistant", "content": "4"}], "rejected": [{"role": "assistant", "content": "5"}]}
    {"chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
     "rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_rl.data import dialogues
from nemo_rl.data.conversations import Conversation, prompted_conversation
from nemo_rl.data.examples import (
    ExampleDataset,
    GeneratedExamples,
    RecordExamples,
    checked_messages,
    checked_tools,
    open_splits,
)
from nemo_rl.data.problem import ChatMessage, shown
from nemo_rl.errors import DataError
from nemo_rl.utils.names import suggest_or_list

if TYPE_CHECKING:
    from nemo_rl.data.config import PreferenceDataConfig, PreferencesConfig


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt.

    Attributes:
        chosen: The prompt with the better answer as its completion.
        rejected: The prompt with the worse answer.
        margin: How much better the answer is, for reward models.
    """

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0


class PreferenceDataset(ExampleDataset["PreferencesConfig", PreferencePair]):
    """Gives access to preference pairs by position. To add a kind, write a subclass and a line in
    `PREFERENCE_DATASETS`.
    """


class RecordPreferences(RecordExamples["PreferencesConfig", PreferencePair], PreferenceDataset):
    """Makes a pair of each record of a file or a Hugging Face data set."""

    @staticmethod
    def from_record(record: dict[str, Any], config: PreferencesConfig, where: str) -> PreferencePair:
        return pair_from_record(record, config, where)


class DialoguePreferences(GeneratedExamples["PreferencesConfig", PreferencePair], PreferenceDataset):
    """Generates pairs that the embedded chat model can learn: see `dialogues.guess_choice` and `product_choice`."""

    @staticmethod
    def from_seed(seed: int) -> PreferencePair:
        prompt, good, bad = dialogues.product_choice(seed) if seed % 2 else dialogues.guess_choice(seed)
        tools = [dialogues.CALCULATOR_SCHEMA] if seed % 2 else []
        return PreferencePair(Conversation(prompt, [good], tools), Conversation(prompt, [bad], tools))


# To add a kind, write one class and one line here (or set `data.train.kind: package.module:Class`).
PREFERENCE_DATASETS: dict[str, type[PreferenceDataset]] = {
    "dialogues": DialoguePreferences,
    "jsonl": RecordPreferences,
    "parquet": RecordPreferences,
    "huggingface": RecordPreferences,
}


def load_preferences(data: PreferenceDataConfig) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """Open a job's train data and its validation data, if any.

    Example:
        >>> from nemo_rl.data.config import PreferenceDataConfig
        >>> train, validation = load_preferences(PreferenceDataConfig())
        >>> train[1].chosen.prompt, train[1].rejected.completion
        ([{'role': 'user', 'content': '337*86'}], [{'role': 'assistant', 'content': 'I cannot compute this.'}])

    Raises:
        ConfigError: `kind` is unknown.
        DataError: The data set is missing or empty.
    """
    return open_splits(data.train, data.validation, PREFERENCE_DATASETS, PreferenceDataset)  # type: ignore[type-abstract]


def pair_from_record(record: dict[str, Any], config: PreferencesConfig, where: str) -> PreferencePair:
    """Turn one record into a pair; see the top of this module for the forms of a record.

    Raises:
        DataError: A key is missing (the message names the nearest one), a value has the wrong form, an answer is empty,
            the answers are equal, or two conversations do not begin with the same messages.
    """
    keys = (config.chosen_key, config.rejected_key)
    for option, key in zip(("chosen_key", "rejected_key"), keys):
        if key not in record:
            raise DataError(f"{where}: no key {key!r} (data.*.{option}){suggest_or_list(key, record)}")
    tools = checked_tools(record.get(config.tools_key), f"{where}: {config.tools_key!r}")
    margin = _margin(record.get(config.margin_key), f"{where}: {config.margin_key!r}")
    if config.prompt_key is not None and config.prompt_key in record:
        answers = [prompted_conversation(record, config.prompt_key, key, tools, where) for key in keys]
    else:
        answers = [Conversation(*parts, tools) for parts in _split(record, config, where)]
    for key, answer in zip(keys, answers):
        if not isinstance(answer.completion, str) and all(map(_is_empty, answer.completion)):
            raise DataError(f"{where}: the answer in {key!r} is empty")
    chosen, rejected = answers
    if chosen == rejected:
        raise DataError(f"{where}: {keys[0]!r} and {keys[1]!r} are equal, so neither is better; remove the record")
    return PreferencePair(chosen, rejected, margin)


def _split(
    record: dict[str, Any], config: PreferencesConfig, where: str
) -> list[tuple[list[ChatMessage], list[ChatMessage]]]:
    """Split the conversations of a record into the messages that both begin with, and the others."""
    keys = (config.chosen_key, config.rejected_key)
    if any(isinstance(record[key], str) for key in keys):
        key = config.prompt_key or "prompt"
        raise DataError(
            f"{where}: no key {key!r} (data.*.prompt_key), which answers that are text need"
            f"{suggest_or_list(key, record)}"
        )
    chosen, rejected = (checked_messages(record[key], f"{where}: {key!r}") for key in keys)
    count = next((i for i, (one, other) in enumerate(zip(chosen, rejected)) if one != other), None)
    if count is None:
        if len(chosen) != len(rejected):
            longer = keys[0] if len(chosen) > len(rejected) else keys[1]
            raise DataError(f"{where}: {longer!r} continues the other conversation, whose answer is therefore empty")
        count = len(chosen) - 1  # they are equal, which the caller reports
    if not count:
        raise DataError(f"{where}: {keys[0]!r} and {keys[1]!r} have no prompt in common: their first messages differ")
    if other_roles := [m["role"] for m in (chosen[count], rejected[count]) if m["role"] != "assistant"]:
        raise DataError(
            f"{where}: {keys[0]!r} and {keys[1]!r} answer different prompts: they differ first in message {count + 1}, "
            f"and its role is {other_roles[0]}"
        )
    return [(chosen[:count], chosen[count:]), (rejected[:count], rejected[count:])]


def _is_empty(message: ChatMessage) -> bool:
    content = message["content"]
    has_text = bool(content.strip()) if isinstance(content, str) else bool(content)
    return not has_text and not message.get("tool_calls")


def _margin(value: Any, where: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where} must be a number, got {shown(value)}")
    return float(value)
