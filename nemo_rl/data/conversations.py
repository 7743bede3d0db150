"""Conversations for supervised fine-tuning, from files, from Hugging Face and from the embedded generator.

A record is a chat (`messages`), or a prompt with its completion, both as text or both as chat messages::

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2?", "completion": "4"}
    {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_rl.data import dialogues
from nemo_rl.data.examples import (
    ExampleDataset,
    GeneratedExamples,
    RecordExamples,
    checked_messages,
    checked_tools,
    open_splits,
)
from nemo_rl.data.problem import ChatMessage
from nemo_rl.errors import DataError
from nemo_rl.utils.names import suggest_or_list

if TYPE_CHECKING:
    from nemo_rl.data.config import ConversationsConfig, SFTDataConfig


@dataclass(frozen=True)
class Conversation:
    """What a model learns to continue, and its continuation.

    Attributes:
        prompt: Text or chat messages, oldest first. No part of it is in the loss. Empty for a chat.
        completion: Text or chat messages, as the prompt. Text, and turns of the assistant, can be in the loss.
        tools: JSON schemas of the tools that the chat template shows.
    """

    prompt: str | list[ChatMessage]
    completion: str | list[ChatMessage]
    tools: list[dict[str, Any]] = field(default_factory=list)


class ConversationDataset(ExampleDataset["ConversationsConfig", Conversation]):
    """Gives access to conversations by position. To add a kind, write a subclass and a line in
    `CONVERSATION_DATASETS`.
    """


class RecordConversations(RecordExamples["ConversationsConfig", Conversation], ConversationDataset):
    """Makes a conversation of each record of a file or a Hugging Face data set."""

    @staticmethod
    def from_record(record: dict[str, Any], config: ConversationsConfig, where: str) -> Conversation:
        return conversation_from_record(record, config, where)


class DialogueConversations(GeneratedExamples["ConversationsConfig", Conversation], ConversationDataset):
    """Generates the dialogues that the embedded chat model can learn, played well: see `dialogues`.

    The player of the guessing game always halves the range. Products are computed by the calculator.
    """

    @staticmethod
    def from_seed(seed: int) -> Conversation:
        if seed % 2:
            return Conversation([], dialogues.computed_product(seed), [dialogues.CALCULATOR_SCHEMA])
        return Conversation([], dialogues.halving_game(seed))


# To add a kind, write one class and one line here (or set `data.train.kind: package.module:Class`).
CONVERSATION_DATASETS: dict[str, type[ConversationDataset]] = {
    "dialogues": DialogueConversations,
    "jsonl": RecordConversations,
    "parquet": RecordConversations,
    "huggingface": RecordConversations,
}


def load_conversations(data: SFTDataConfig) -> tuple[ConversationDataset, ConversationDataset | None]:
    """Open a job's train data and its validation data, if any.

    Example:
        >>> from nemo_rl.data.config import SFTDataConfig
        >>> train, validation = load_conversations(SFTDataConfig())
        >>> len(train), len(validation)
        (4096, 256)

    Raises:
        ConfigError: `kind` is unknown.
        DataError: The data set is missing or empty.
    """
    return open_splits(data.train, data.validation, CONVERSATION_DATASETS, ConversationDataset)  # type: ignore[type-abstract]


def conversation_from_record(record: dict[str, Any], config: ConversationsConfig, where: str) -> Conversation:
    """Turn one record into a conversation; see the top of this module for the forms of a record.

    Raises:
        DataError: A key is missing (the message names the nearest one), or a value is no text and no list of chat
            messages.
    """
    tools = checked_tools(record.get(config.tools_key), f"{where}: {config.tools_key!r}")
    if config.messages_key in record:
        key = config.messages_key
        return Conversation([], checked_messages(record[key], f"{where}: {key!r}"), tools)
    keys = (config.prompt_key, config.completion_key)
    missing = [key for key in keys if key not in record]
    if missing:
        # A record with one of the two is a prompt with completion; one with neither is probably a chat.
        option, key = ("messages_key", config.messages_key)
        if len(missing) == 1:
            key = missing[0]
            option = "prompt_key" if key == config.prompt_key else "completion_key"
        raise DataError(f"{where}: no key {key!r} (data.*.{option}){suggest_or_list(key, record)}")
    return prompted_conversation(record, config.prompt_key, config.completion_key, tools, where)


def prompted_conversation(
    record: dict[str, Any], prompt_key: str, completion_key: str, tools: list[dict[str, Any]], where: str
) -> Conversation:
    """Return a prompt of a record with its completion. Raises `DataError` if they are not of one form, or are empty."""
    prompt, completion = record[prompt_key], record[completion_key]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise DataError(f"{where}: {completion_key!r} is empty")
        return Conversation(prompt, completion, tools)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(
            f"{where}: {prompt_key!r} and {completion_key!r} must both be text or both be lists of chat messages, got "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    prompt = checked_messages(prompt, f"{where}: {prompt_key!r}")
    return Conversation(prompt, checked_messages(completion, f"{where}: {completion_key!r}"), tools)
