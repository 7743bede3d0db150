"""A problem, and the base class of data sets."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, overload

from nemo_rl.errors import DataError
from nemo_rl.utils.names import suggest_or_list

if TYPE_CHECKING:
    from nemo_rl.data.config import DataConfig, DatasetConfig

Role: TypeAlias = Literal["train", "validation"]
ChatMessage: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One problem to solve.

    Attributes:
        prompt: Text, or chat messages (`{"role": ..., "content": ...}`), oldest first. Empty: the environment shows
            its own.
        answer: The expected answer as text.
        index: Position in its data set.
        metadata: All other fields of the record.
    """

    prompt: str | list[ChatMessage]
    answer: str
    index: int
    metadata: dict[str, Any] = field(default_factory=dict)


class ProblemDataset(Sequence[Problem]):
    """Gives access to problems by position. To add a kind, write a subclass and a line in `datasets.DATASETS`.

    Records are checked when the data set is opened, so that a job fails before it starts workers. Problems are made
    when they are accessed.
    """

    @classmethod
    @abstractmethod
    def from_config(cls, config: DatasetConfig, data: DataConfig, role: Role) -> Self:
        """Open the data set, at most `config.max_num_problems` of it, and check its records.

        Raises:
            DataError: The data set is missing, or a record is invalid; the message names file and line, or row.
        """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def problem(self, index: int) -> Problem:
        """Return the problem at `0 <= index < len(self)`."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the place of a problem's record for messages: file and line, or data set and row."""

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...

    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self.problem(i) for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"problem {index} is out of range: there are {len(self)}")
        return self.problem(position)


def problem_from_record(record: dict[str, Any], index: int, config: DatasetConfig, where: str) -> Problem:
    """Turn one record into a problem; keys other than prompt and answer become metadata.

    Raises:
        DataError: A key is missing (the message names the nearest one), a value is not a valid prompt or answer, a text
            cannot be encoded as UTF-8, or `answer_pattern` does not match.
    """
    rest = dict(record)
    for option, key in (("data.*.prompt_key", config.prompt_key), ("data.*.answer_key", config.answer_key)):
        if key not in record:
            raise DataError(f"{where}: no key {key!r} ({option}){suggest_or_list(key, record)}")
        rest.pop(key, None)
    for key, value in record.items():
        check_encodable(value, f"{where}: {key!r}")
    prompt = _checked_prompt(record[config.prompt_key], f"{where}: {config.prompt_key!r}")
    where_answer = f"{where}: {config.answer_key!r}"
    answer = _answer_text(record[config.answer_key], where_answer)
    if config.answer_pattern is not None:
        answer = _matched_answer(config.answer_pattern, answer, where_answer)
    return Problem(prompt, answer, index, rest)


def check_encodable(value: Any, where: str) -> None:
    """Raise `DataError` for text with a lone surrogate, which JSON can express and no tokenizer or file can hold."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_encodable(key, where)
            check_encodable(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            check_encodable(item, where)
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} contains {value[error.start]!a} at character {error.start}: half of a surrogate pair, which "
                "cannot be encoded as UTF-8. Write the full character, or remove it"
            ) from None


def _checked_prompt(value: Any, where: str) -> str | list[ChatMessage]:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where} is an empty prompt")
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be text or a list of chat messages, got {shown(value)}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{where}: a chat message must have the keys role and content, got {shown(message)}")
    return value


def _answer_text(value: Any, where: str) -> str:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where} is an empty answer")
        return value
    # In Python, bool is an int, but True is not a number that an answer can be compared with.
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise DataError(f"{where} must be a finite number, got {shown(value)}")
        return f"{value:f}" if isinstance(value, Decimal) else str(value)
    raise DataError(f"{where} must be text or a number, got {shown(value)}")


def _matched_answer(pattern: str, text: str, where: str) -> str:
    match = re.search(pattern, text)
    answer = (match[1] or "").strip() if match else ""
    if not answer:
        problem = "matches an empty answer in" if match else "is not found in"
        raise DataError(f"{where}: the pattern {pattern!r} (data.*.answer_pattern) {problem} {shown(text)}")
    return answer


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
