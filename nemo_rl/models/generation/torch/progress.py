"""Tracks the rows of a batch: their tokens so far, which rows have ended, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_rl.models.generation.results import Completion
from nemo_rl.models.generation.sampling import Drawn
from nemo_rl.models.generation.stop import StopRules

# Dropping rows copies the cache, which costs about as much as one step. Ended rows stay until this share has ended.
_DROPPED_SHARE = 0.25


@dataclass(frozen=True)
class Completions:
    """The completions of a batch: tensors [B, T] on the CPU; row b uses the first `lengths[b]` columns.

    `experts` are those of `Completion`, row by row.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    sampling_logprobs: torch.Tensor
    lengths: list[int]
    truncated: list[bool]
    experts: list[torch.Tensor] | None = None

    def rows(self) -> Iterator[Completion]:
        """Yield the completions row by row, cut off at their ends."""
        inside = torch.arange(self.tokens.shape[1]) < torch.tensor(self.lengths)[:, None]
        by_row = [part[inside].split(self.lengths) for part in (self.tokens, self.logprobs, self.sampling_logprobs)]
        for index, (tokens, logprobs, sampling_logprobs) in enumerate(zip(*by_row, strict=True)):
            experts = None if self.experts is None else self.experts[index]
            yield Completion(tokens, logprobs, sampling_logprobs, self.truncated[index], experts)


class Progress:
    """Collects the tokens drawn for B rows and determines which rows have ended.

    Between two checks all data stays on the device; a check waits for the device.

    Args:
        stop: When completions end.
        limits: Most tokens of each row.
        device: Where tokens are drawn.

    Attributes:
        stop_ids: [S] int64, the stop tokens.
        num_live: number of rows that had not ended at the last check.
    """

    def __init__(self, stop: StopRules, limits: list[int], device: torch.device) -> None:
        shape = (len(limits), max(limits))
        self._stop = stop
        self.stop_ids = torch.tensor(sorted(stop.token_ids), dtype=torch.int64, device=device)
        self._limits = limits
        self._shortest = min(limits)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(2, *shape, device=device)
        self._live = torch.arange(len(limits), device=device)
        self._live_rows = list(range(len(limits)))
        self._ends: list[int | None] = [None] * len(limits)
        self._truncated = [False] * len(limits)
        # One entry per step since rows were last dropped, [live] each; the first belongs to column `_first_column`.
        self._drawn: list[Drawn] = []
        self._first_column = 0
        self._num_checked = 0
        self._texts: list[list[int]] | None = [[] for _ in limits] if stop.strings else None
        self.num_live = len(limits)

    def append(self, drawn: Drawn) -> None:
        """Append one token to each live row."""
        self._drawn.append(drawn)

    def check(self) -> torch.Tensor | None:
        """Check the tokens since the last check, and update `num_live`, the number of rows that have not ended.

        Returns:
            The positions, among the current rows, of the rows to keep; drop the others. None: keep all rows, including
            the ended ones.
        """
        start = self._num_checked
        new = self._drawn[start - self._first_column :]
        self._num_checked += len(new)
        if self._texts is not None or any(drawn.has_stop is not False for drawn in new):
            for position, end in self._ends_in(torch.stack([drawn.tokens for drawn in new], dim=1), start):
                row = self._live_rows[position]
                if self._ends[row] is None and end <= self._limits[row]:
                    self._ends[row] = end
        if self._num_checked >= self._shortest:
            for row in self._live_rows:
                if self._ends[row] is None and self._limits[row] <= self._num_checked:
                    self._ends[row] = self._limits[row]
                    self._truncated[row] = True
        live = [position for position, row in enumerate(self._live_rows) if self._ends[row] is None]
        self.num_live = len(live)
        num_dropped = len(self._live_rows) - len(live)
        if num_dropped < max(1, _DROPPED_SHARE * len(self._live_rows)):
            return None
        self._store()
        keep = torch.tensor(live, dtype=torch.int64, device=self._live.device)
        self._live = self._live[keep]
        self._live_rows = [self._live_rows[position] for position in live]
        return keep

    def completions(self) -> Completions:
        """Return the completions. Every row must have ended."""
        self._store()
        lengths = [end for end in self._ends if end is not None]
        assert len(lengths) == len(self._limits), "a row has not ended"
        logprobs = self._logprobs.cpu()
        return Completions(self._tokens.cpu(), logprobs[0], logprobs[1], lengths, self._truncated)

    def _store(self) -> None:
        """Move the tokens drawn since rows were last dropped into the results."""
        if not self._drawn:
            return
        columns = slice(self._first_column, self._first_column + len(self._drawn))
        self._tokens[self._live, columns] = torch.stack([drawn.tokens for drawn in self._drawn], dim=1)
        self._logprobs[0, self._live, columns] = torch.stack([drawn.logprobs for drawn in self._drawn], dim=1)
        self._logprobs[1, self._live, columns] = torch.stack([drawn.sampling_logprobs for drawn in self._drawn], dim=1)
        self._first_column = columns.stop
        self._drawn.clear()

    def _ends_in(self, tokens: torch.Tensor, start: int) -> Iterator[tuple[int, int]]:
        """Yield the positions of live rows that end in `tokens`, and their completions' lengths."""
        if self._texts is None:
            hits = torch.isin(tokens, self.stop_ids).any(dim=1).nonzero()[:, 0].tolist()
            for position in hits:
                end = self._stop.first_end(tokens[position].tolist(), 0)
                assert end is not None
                yield position, start + end
            return
        for position, new in enumerate(tokens.tolist()):
            row = self._live_rows[position]
            if self._ends[row] is None:
                text = self._texts[row]
                text.extend(new)
                end = self._stop.first_end(text, start)
                if end is not None:
                    yield position, end
