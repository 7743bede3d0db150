"""Examples of a data set as rows of tokens, and their batches: what conversations and preference pairs share."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemo_rl.data.conversation_encoder import ConversationEncoder, TokenizedConversation
from nemo_rl.data.examples import ExampleDataset
from nemo_rl.data.loader import EpochOrder
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import DataError

logger = logging.getLogger(__name__)

_BATCH_SIZE = 1024

ExampleT = TypeVar("ExampleT")
ItemT = TypeVar("ItemT")


class TokenizedExamples(Sequence[ItemT], Generic[ExampleT, ItemT]):
    """Tokenizes all examples of a data set once, before any worker starts. Memory holds 5 bytes per token.

    An example is one row of a batch or several. A subclass says which.

    Args:
        dataset: The examples.
        encoder: Tokenizes them.
        max_length: Longest row in tokens (`policy.max_sequence_length`).
        overlong: What to do with longer ones; see `data.overlong`. A truncated example is dropped if nothing is left
            to learn from it.

    Attributes:
        items: What the examples are called in messages.
        num_dropped, num_truncated: Number of examples that were too long.
        num_tokens, num_loss_tokens: Tokens of all examples that are left.
        digest: Changes with any token and with the loss mask.

    Raises:
        ConfigError, DataError: See `ConversationEncoder`. Or an example is too long and such ones are not dropped, or
            none is left.
    """

    items: ClassVar[str]
    _rows_per_example: ClassVar[int] = 1

    def __init__(
        self,
        dataset: ExampleDataset[Any, ExampleT],
        encoder: ConversationEncoder,
        max_length: int,
        overlong: str = "error",
    ) -> None:
        ids, in_loss, offsets = array("i"), bytearray(), array("q", [0])
        digest = xxhash.xxh3_64()
        longest = self.num_dropped = self.num_truncated = 0
        for start in range(0, len(dataset), _BATCH_SIZE):
            indices = range(start, min(start + _BATCH_SIZE, len(dataset)))
            where = [dataset.where(index) for index in indices]
            examples = [dataset[index] for index in indices]
            for place, example, rows in zip(where, examples, self._encode(encoder, examples, where), strict=True):
                length = max(len(row.input_ids) for row in rows)
                longest = max(longest, length)
                if length > max_length and overlong == "error":
                    raise DataError(
                        f"{place}: the conversation has {length} tokens, more than policy.max_sequence_length="
                        f"{max_length}; raise that, or set data.overlong=drop or truncate"
                    )
                kept = [TokenizedConversation(row.input_ids[:max_length], row.in_loss[:max_length]) for row in rows]
                if length > max_length and (overlong == "drop" or not self._is_useful(kept)):
                    self.num_dropped += 1
                    continue
                self.num_truncated += length > max_length
                for row in kept:
                    ids.frombytes(row.input_ids.tobytes())
                    in_loss += row.in_loss.tobytes()
                    offsets.append(len(ids))
                    digest.update(row.input_ids.tobytes())
                    digest.update(row.in_loss.tobytes())
                self._keep(example, digest)
        self._ids, self._offsets = np.asarray(ids, dtype=np.int32), np.asarray(offsets)
        self._in_loss = np.frombuffer(bytes(in_loss), dtype=np.bool_)
        self.digest: str = digest.hexdigest()
        self.num_tokens, self.num_loss_tokens = len(self._ids), int(self._in_loss.sum())
        if self.num_dropped or self.num_truncated:
            what = f"more than policy.max_sequence_length={max_length} tokens (the longest has {longest})"
            if not len(self):
                raise DataError(f"all {len(dataset)} {self.items} have {what}; raise it")
            logger.warning(
                "of %d %s with %s, %d are truncated and %d dropped",
                self.num_dropped + self.num_truncated,
                self.items,
                what,
                self.num_truncated,
                self.num_dropped,
            )

    @abstractmethod
    def _encode(
        self, encoder: ConversationEncoder, examples: Sequence[ExampleT], where: Sequence[str]
    ) -> Iterable[Sequence[TokenizedConversation]]:
        """Return the rows of each example."""

    def _is_useful(self, rows: Sequence[TokenizedConversation]) -> bool:
        """Return whether anything can be learned from the rows of a truncated example."""
        return all(row.in_loss.any() for row in rows)

    def _keep(self, example: ExampleT, digest: xxhash.xxh3_64) -> None:
        """Keep what a batch needs of an example besides its tokens."""

    @abstractmethod
    def _item(self, position: int, rows: list[TokenizedConversation]) -> ItemT:
        """Return the item of an example with these rows."""

    def counts(self) -> dict[str, int]:
        """Return the numbers of examples and tokens, for the record of a run."""
        return {
            self.items: len(self),
            "dropped": self.num_dropped,
            "truncated": self.num_truncated,
            "tokens": self.num_tokens,
            "loss_tokens": self.num_loss_tokens,
        }

    def last_tokens(self) -> NDArray[np.int32]:
        """Return the last token of each row."""
        return self._ids[self._offsets[1:] - 1]

    def __len__(self) -> int:
        return (len(self._offsets) - 1) // self._rows_per_example

    @overload
    def __getitem__(self, index: int) -> ItemT: ...
    @overload
    def __getitem__(self, index: slice) -> list[ItemT]: ...

    def __getitem__(self, index: int | slice) -> ItemT | list[ItemT]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"example {index} is out of range: there are {len(self)} {self.items}")
        first = position * self._rows_per_example
        parts = [slice(*self._offsets[row : row + 2]) for row in range(first, first + self._rows_per_example)]
        return self._item(position, [TokenizedConversation(self._ids[part], self._in_loss[part]) for part in parts])


class ExampleLoader(Generic[ItemT]):
    """Iterates over tokenized examples epoch after epoch, see `EpochOrder`.

    Every batch is full. Examples that do not fill a batch at the end of the last epoch are not used.

    Args:
        examples: The examples.
        collate: Makes a batch of examples, such as `collate_conversations`.
        seed: Decides the order of every epoch.
        shuffle: False keeps the data set's order in every epoch.
        num_epochs: Number of epochs. None: no limit.
    """

    def __init__(
        self,
        examples: TokenizedExamples[Any, ItemT],
        collate: Callable[[Sequence[ItemT]], BatchedDataDict],
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int | None = None,
    ) -> None:
        self._examples, self._collate = examples, collate
        self._order = EpochOrder(
            len(examples), examples.digest, seed=seed, shuffle=shuffle, num_epochs=num_epochs, items=examples.items
        )

    @property
    def epoch(self) -> float:
        """Number of epochs so far."""
        return self._order.num_drawn / len(self._examples)

    def num_batches_left(self, size: int) -> int | None:
        """Return the number of batches of `size` that are left in all epochs, or None without a limit."""
        left = self._order.num_left
        return None if left is None else max(left, 0) // size

    def next_batch(self, size: int) -> BatchedDataDict | None:
        """Return the next batch, or None if fewer examples are left."""
        drawn = self._order.draw(size)
        return None if drawn is None else self._collate([self._examples[index] for index in drawn])

    def upcoming(self, count: int | None) -> list[int]:
        """Return the distinct positions of the next `count` examples (None: of all), without drawing them."""
        left = self._order.num_left
        count = left if count is None else count if left is None else min(count, left)
        if count is None or count >= len(self._examples):
            return list(range(len(self._examples)))
        drawn = copy.copy(self._order).draw(max(count, 0))
        return list(dict.fromkeys(drawn or []))

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain data, see `EpochOrder.state_dict`."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, see `EpochOrder.load_state_dict`. Raises `CheckpointError`."""
        self._order.load_state_dict(state)
