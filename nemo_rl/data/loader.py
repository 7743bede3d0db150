"""Batches of prompts, in an order that depends only on the seed and on the number of prompts taken before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_rl.data.collation import collate
from nemo_rl.data.permutation import permutation
from nemo_rl.data.processing import TokenizedProblems
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)


class EpochOrder:
    """Draws positions of a data set epoch after epoch; each epoch has another order.

    Epochs follow each other without a gap: a draw may contain the end of one epoch and the start of the next.

    Args:
        size: Number of items, at least 1.
        digest: Identifies the data, so that a checkpoint is not continued with other data.
        seed: Decides the order of every epoch.
        shuffle: False keeps the data set's order in every epoch.
        num_epochs: Number of epochs. None: no limit.
        items: What the items are called in messages.
    """

    def __init__(
        self, size: int, digest: str, *, seed: int, shuffle: bool, num_epochs: int | None, items: str = "problems"
    ) -> None:
        if not size:
            raise DataError(f"there are no {items} to load")
        self._size, self._digest, self._items = size, digest, items
        self._seed, self._shuffle, self._num_epochs = seed, shuffle, num_epochs
        self._epoch, self._position = 0, 0
        self._order = self._epoch_order(0)

    @property
    def epoch(self) -> int:
        """Number of complete epochs so far."""
        return self._epoch

    @property
    def num_drawn(self) -> int:
        """Number of items drawn so far."""
        return self._epoch * self._size + self._position

    @property
    def num_left(self) -> int | None:
        """Number of items that are left in all epochs, or None without a limit."""
        return None if self._num_epochs is None else self._num_epochs * self._size - self.num_drawn

    def draw(self, count: int) -> list[int] | None:
        """Return the next `count` positions, or None if fewer are left in the epochs."""
        left = self.num_left
        if left is not None and count > left:
            if left > 0:
                logger.info("the last %d %s do not fill a batch and are not used", left, self._items)
            return None
        return [self._next() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain data. With the same data and seed, it decides all later draws."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in `state`. The sizes of draws and `num_epochs` may differ from the earlier run.

        Raises:
            CheckpointError: The state belongs to other data, another seed or another order.
        """
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise CheckpointError(f"the data position of the checkpoint lacks {missing}")
        for name, value in self._identity().items():
            if state[name] != value:
                raise CheckpointError(
                    f"the checkpoint's data position belongs to other data: {name} was {state[name]!r} and is now "
                    f"{value!r}. Resume with the data, seed and data.* options of the run, or start a new one."
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < self._size:
            raise CheckpointError(f"the checkpoint's data position is impossible: epoch {epoch}, position {position}")
        self._epoch, self._position = epoch, position
        self._order = self._epoch_order(epoch)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            f"num_{self._items}": self._size,
            "digest": self._digest,
        }

    def _next(self) -> int:
        index = int(self._order[self._position])
        self._position += 1
        if self._position == self._size:
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._epoch_order(self._epoch)
        return index

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(self._size, dtype=np.int64)
        return permutation(self._size, self._seed, epoch)


class PromptLoader:
    """Iterates over the problems epoch after epoch, see `EpochOrder`.

    Every batch is full. Problems that do not fill a batch at the end of the last epoch are not used.

    Example:

        loader = PromptLoader(problems, tokenizer.pad_token_id, seed=0)
        batch = loader.next_batch(8)
        state = loader.state_dict()

    Args:
        problems: The problems.
        pad_token_id: See `collation.collate`.
        padding_side: See `collation.collate`.
        seed: Decides the order of every epoch.
        shuffle: False keeps the data set's order in every epoch.
        num_epochs: Number of epochs. None: no limit.
    """

    def __init__(
        self,
        problems: TokenizedProblems,
        pad_token_id: int,
        *,
        padding_side: Literal["left", "right"] = "right",
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int | None = None,
    ) -> None:
        self._problems = problems
        self._pad_token_id, self._padding_side = pad_token_id, padding_side
        self._num_epochs = num_epochs
        self._order = EpochOrder(len(problems), problems.digest, seed=seed, shuffle=shuffle, num_epochs=num_epochs)

    @property
    def epoch(self) -> int:
        """Number of complete epochs so far."""
        return self._order.epoch

    def next_batch(self, num_problems: int) -> BatchedDataDict | None:
        """Return the next problems (see `collation.collate`), or None if fewer are left in the epochs.

        Raises:
            DataError: All epochs together contain fewer problems than one batch.
        """
        if num_problems < 1:
            raise ValueError(f"num_problems must be at least 1, got {num_problems}.")
        if self._num_epochs is not None and num_problems > self._num_epochs * len(self._problems):
            raise DataError(
                f"{len(self._problems)} problems in {self._num_epochs} epochs do not make one batch of "
                f"{num_problems}; lower num_prompts_per_step or raise max_num_epochs"
            )
        drawn = self._order.draw(num_problems)
        if drawn is None:
            return None
        return collate([self._problems[index] for index in drawn], self._pad_token_id, self._padding_side)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain data, see `EpochOrder.state_dict`."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, see `EpochOrder.load_state_dict`. Raises `CheckpointError`."""
        self._order.load_state_dict(state)


class MixedLoader:
    """Draws the problems of each batch from several loaders, in proportion to their weights.

    The shares are exact: after any number of problems, each loader has given its share, rounded up or down (up to the
    rounding of all others), because the next problem comes from the loader that is furthest behind.

    Example:

        loader = MixedLoader({"math": math, "nim": nim}, lambda batch: {"math": 3, "nim": 1}, pad_token_id=0)
        loader.next_batch(8)["environment"]  # math six times, nim twice

    Args:
        loaders: The loaders, by the name of their environment.
        weights: Returns the weights of all loaders for a batch, counted from 1. One of them must be above 0.
        pad_token_id: See `collation.collate`.
    """

    def __init__(
        self,
        loaders: Mapping[str, PromptLoader],
        weights: Callable[[int], Mapping[str, float]],
        pad_token_id: int,
    ) -> None:
        self._loaders, self._weights, self._pad_token_id = dict(loaders), weights, pad_token_id
        self._num_batches = 0
        self._owed = dict.fromkeys(loaders, 0.0)

    def next_batch(self, num_problems: int) -> BatchedDataDict | None:
        """Return the next problems, with the list `environment`. None if a loader has no more."""
        names = self._choose(num_problems)
        parts, order = [], []
        for name, loader in self._loaders.items():
            rows = [row for row, chosen in enumerate(names) if chosen == name]
            if not rows:
                continue
            part = loader.next_batch(len(rows))
            if part is None:
                return None
            part["environment"] = [name] * len(rows)
            parts.append(part)
            order += rows
        batch = BatchedDataDict.from_batches(parts, pad_value_dict={"input_ids": self._pad_token_id})
        return batch.select_indices(torch.tensor(order).argsort())

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain data."""
        loaders = {name: loader.state_dict() for name, loader in self._loaders.items()}
        return {"num_batches": self._num_batches, "owed": dict(self._owed), "loaders": loaders}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in `state`. Raises `CheckpointError` if it belongs to other environments."""
        found = sorted(state.get("loaders", {}))
        if found != sorted(self._loaders):
            raise CheckpointError(
                f"the checkpoint's data position belongs to the environments {found}, and the job has "
                f"{sorted(self._loaders)}. Resume with the same environments, or start a new run"
            )
        for name, loader in self._loaders.items():
            loader.load_state_dict(state["loaders"][name])
        self._num_batches, self._owed = int(state["num_batches"]), dict(state["owed"])

    def _choose(self, num_problems: int) -> list[str]:
        """Return the loader of each problem of the next batch."""
        self._num_batches += 1
        weights = self._weights(self._num_batches)
        total = sum(weights.values())
        names = []
        for _ in range(num_problems):
            for name in self._owed:
                self._owed[name] += weights[name] / total
            chosen = max((name for name in self._owed if weights[name]), key=self._owed.__getitem__)
            self._owed[chosen] -= 1.0
            names.append(chosen)
        return names


def validation_batch(
    problems: TokenizedProblems,
    pad_token_id: int,
    max_num_problems: int | None = None,
    padding_side: Literal["left", "right"] = "right",
) -> BatchedDataDict:
    """Return the first problems, in the data set's order, as one batch: the same at every validation."""
    return collate(problems[: max_num_problems or len(problems)], pad_token_id, padding_side)
