"""How far the rows of a batch have come: tokens so far, which rows have ended and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_rl.models.generation.results import Completion
from nemo_rl.models.generation.sampling import Drawn
from nemo_rl.models.generation.stop import StopRules

# Dropping rows copies the cache, about as expensive as one step; ended rows are computed along until it pays.
_DROPPED_SHARE = 0.25


@dataclass(frozen=True)
class Completions:
    """A batch: tensors [B, T] on the CPU, of which the first `lengths[b]` columns of row b count."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    sampling_logprobs: torch.Tensor
    lengths: list[int]
    truncated: list[bool]

    def rows(self) -> Iterator[Completion]:
        """Row by row, without what comes after the end."""
        for index, length in enumerate(self.lengths):
            yield Completion(
                self.tokens[index, :length],
                self.logprobs[index, :length],
                self.sampling_logprobs[index, :length],
                self.truncated[index],
            )


class Progress:
    """Collects what is drawn for B rows and finds out which have ended.

    Between two checks everything stays on the device; a check waits for it.
    """

    def __init__(self, stop: StopRules, limits: list[int], device: torch.device) -> None:
        """Args: when completions end; the most tokens of each row; where tokens are drawn."""
        shape = (len(limits), max(limits))
        self._stop = stop
        self._stop_ids = torch.tensor(sorted(stop.token_ids), dtype=torch.int64, device=device)
        self._limits = limits
        self._shortest = min(limits)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(2, *shape, device=device)
        self._live = torch.arange(len(limits), device=device)
        self._live_rows = list(range(len(limits)))
        self._ends: list[int | None] = [None] * len(limits)
        self._truncated = [False] * len(limits)
        # Drawn for the rows that are live now: [live] each. The first of them belongs to column `_first_column`.
        self._drawn: list[Drawn] = []
        self._first_column = 0
        self._num_checked = 0
        self._texts: list[list[int]] | None = [[] for _ in limits] if stop.strings else None
        self.num_live = len(limits)

    def append(self, drawn: Drawn) -> None:
        """One more token for each live row."""
        self._drawn.append(drawn)

    def check(self) -> torch.Tensor | None:
        """Look at the tokens since the last check; updates `num_live`, the number of rows that go on.

        Returns:
            The positions, among the rows drawn for so far, of those to go on with (the others are dropped), or None to
            go on with all, ended ones included.
        """
        start = self._num_checked
        new = [drawn.tokens for drawn in self._drawn[start - self._first_column :]]
        self._num_checked += len(new)
        for position, end in self._found_ends(torch.stack(new, dim=1) if len(new) > 1 else new[0][:, None], start):
            row = self._live_rows[position]
            if self._ends[row] is None and end <= self._limits[row]:
                self._ends[row] = end
        if self._num_checked >= self._shortest:
            for row in self._live_rows:
                if self._ends[row] is None and self._limits[row] <= self._num_checked:
                    self._ends[row] = self._limits[row]
                    self._truncated[row] = True
        going_on = [position for position, row in enumerate(self._live_rows) if self._ends[row] is None]
        self.num_live = len(going_on)
        num_dropped = len(self._live_rows) - len(going_on)
        if num_dropped < max(1, _DROPPED_SHARE * len(self._live_rows)):
            return None
        self._store()
        keep = torch.tensor(going_on, dtype=torch.int64, device=self._live.device)
        self._live = self._live[keep]
        self._live_rows = [self._live_rows[position] for position in going_on]
        return keep

    def completions(self) -> Completions:
        """What was drawn; every row has ended by now."""
        self._store()
        lengths = [end for end in self._ends if end is not None]
        assert len(lengths) == len(self._limits), "a row has not ended"
        logprobs = self._logprobs.cpu()
        return Completions(self._tokens.cpu(), logprobs[0], logprobs[1], lengths, self._truncated)

    def _store(self) -> None:
        """Move what was drawn since rows were last dropped into the results."""
        if not self._drawn:
            return
        columns = slice(self._first_column, self._first_column + len(self._drawn))
        self._tokens[self._live, columns] = torch.stack([drawn.tokens for drawn in self._drawn], dim=1)
        self._logprobs[0, self._live, columns] = torch.stack([drawn.logprobs for drawn in self._drawn], dim=1)
        self._logprobs[1, self._live, columns] = torch.stack([drawn.sampling_logprobs for drawn in self._drawn], dim=1)
        self._first_column = columns.stop
        self._drawn.clear()

    def _found_ends(self, tokens: torch.Tensor, start: int) -> Iterator[tuple[int, int]]:
        """Positions of live rows that stop in `tokens`, and the length of the completion up to there."""
        if self._texts is None:
            hits = torch.isin(tokens, self._stop_ids).any(dim=1).nonzero()[:, 0].tolist()
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
