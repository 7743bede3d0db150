"""Conversations for supervised fine-tuning, from files, from Hugging Face and from the embedded generator.

A record is a chat (`messages`), or a prompt with its completion, both as text or both as chat messages::

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2?", "completion": "4"}
    {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]}
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, overload

from nemo_rl.data import dialogues
from nemo_rl.data.datasets import find_dataset_class
from nemo_rl.data.problem import ChatMessage, Role, check_encodable, shown
from nemo_rl.data.records import Records, open_records, records_kind
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


class ConversationDataset(Sequence[Conversation]):
    """Gives access to conversations by position. To add a kind, write a subclass and a line in
    `CONVERSATION_DATASETS`.

    Records are checked when they are tokenized, before a job starts workers.
    """

    @classmethod
    @abstractmethod
    def from_config(cls, config: ConversationsConfig, role: Role) -> Self:
        """Open the data set, at most `config.max_num_records` of it. Raises `DataError` if it cannot be read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def conversation(self, index: int) -> Conversation:
        """Return the conversation at `0 <= index < len(self)`. Raises `DataError` for an invalid record."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the place of a record for messages: file and line, or data set and row."""

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self.conversation(i) for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"conversation {index} is out of range: there are {len(self)}")
        return self.conversation(position)


class RecordConversations(ConversationDataset):
    """Makes a conversation of each record of a file or a Hugging Face data set."""

    def __init__(self, records: Records, config: ConversationsConfig) -> None:
        self._records, self._config = records, config

    @classmethod
    def from_config(cls, config: ConversationsConfig, role: Role) -> Self:
        return cls(open_records(config, config.max_num_records), config)

    def __len__(self) -> int:
        return len(self._records)

    def conversation(self, index: int) -> Conversation:
        return conversation_from_record(self._records.record(index), self._config, self.where(index))

    def where(self, index: int) -> str:
        return self._records.where(index)


class DialogueConversations(ConversationDataset):
    """Generates the dialogues that the embedded chat model can learn, played well: see `dialogues`.

    The player of the guessing game always halves the range. Products are computed by the calculator. The seeds of
    training count from 0 and those of validation from 2**31, so they have none in common.
    """

    def __init__(self, first_seed: int, count: int) -> None:
        self._first_seed, self._count = first_seed, count

    @classmethod
    def from_config(cls, config: ConversationsConfig, role: Role) -> Self:
        if role == "train":
            return cls(0, config.max_num_records or 4096)
        return cls(2**31, config.max_num_records or 256)

    def __len__(self) -> int:
        return self._count

    def conversation(self, index: int) -> Conversation:
        seed = self._first_seed + index
        if index % 2:
            return Conversation([], dialogues.computed_product(seed), [dialogues.CALCULATOR_SCHEMA])
        return Conversation([], dialogues.halving_game(seed))

    def where(self, index: int) -> str:
        return f"dialogue {self._first_seed + index}"


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
    validation = data.validation
    if validation is None and _kind(data.train) == "dialogues":
        validation = data.train.model_copy(update={"max_num_records": None})
    train = _open(data.train, "train")
    return train, None if validation is None else _open(validation, "validation")


def _kind(config: ConversationsConfig) -> str:
    kind = records_kind(config)
    return "dialogues" if kind == "auto" else kind


def _open(config: ConversationsConfig, role: Role) -> ConversationDataset:
    kind = _kind(config)
    dataset_class = find_dataset_class(kind, CONVERSATION_DATASETS, ConversationDataset, key=f"data.{role}.kind")  # type: ignore[type-abstract]
    dataset = dataset_class.from_config(config, role)
    if not len(dataset):
        raise DataError(f"data.{role}: {config.path or config.kind} contains no records")
    return dataset


def conversation_from_record(record: dict[str, Any], config: ConversationsConfig, where: str) -> Conversation:
    """Turn one record into a conversation; see the top of this module for the forms of a record.

    Raises:
        DataError: A key is missing (the message names the nearest one), or a value is no text and no list of chat
            messages.
    """
    for key, value in record.items():
        check_encodable(value, f"{where}: {key!r}")
    tools = _tools(record.get(config.tools_key), f"{where}: {config.tools_key!r}")
    if config.messages_key in record:
        key = config.messages_key
        return Conversation([], _messages(record[key], f"{where}: {key!r}"), tools)
    keys = (config.prompt_key, config.completion_key)
    missing = [key for key in keys if key not in record]
    if missing:
        # A record with one of the two is a prompt with completion; one with neither is probably a chat.
        option, key = ("messages_key", config.messages_key)
        if len(missing) == 1:
            key = missing[0]
            option = "prompt_key" if key == config.prompt_key else "completion_key"
        raise DataError(f"{where}: no key {key!r} (data.*.{option}){suggest_or_list(key, record)}")
    prompt, completion = (record[key] for key in keys)
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise DataError(f"{where}: {config.completion_key!r} is empty")
        return Conversation(prompt, completion, tools)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(
            f"{where}: {keys[0]!r} and {keys[1]!r} must both be text or both be lists of chat messages, got "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    messages = [_messages(value, f"{where}: {key!r}") for key, value in zip(keys, (prompt, completion))]
    return Conversation(messages[0], messages[1], tools)


def _messages(value: Any, where: str) -> list[ChatMessage]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of chat messages, got {shown(value)}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{where}: a chat message must have the keys role and content, got {shown(message)}")
    return value


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):  # as data sets store schemas, whose keys differ from row to row
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where} is no JSON: {error}") from None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where} must be a list of JSON schemas, got {shown(value)}")
    return value
