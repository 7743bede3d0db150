"""The job's rows in vLLM's batch: the tokens are drawn by `nemo_rl.models.generation.sampling`, as with every backend.

vLLM returns the log-probability of a sampled token either before or after top-k and top-p, not both, and it draws
requests with seeds one by one. Here a logits processor (`row_sampler`) draws all rows of the job at once from the rows'
own random streams, records both log-probabilities, and leaves vLLM a single possible token, which vLLM takes greedily.

::

    engine step ──► logits [B, V] ──► draw_rows ──► one finite logit per row ──► argmax
                                        │   ▲
                   log-probabilities,   ▼   │ uniform of (seed, row, token index)
                   by row and index    Draws, one per request of the job

This module does not import vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from nemo_rl.models.generation.interfaces import GenerationRequest
from nemo_rl.models.generation.sampling import Sampler, row_uniforms

# Key in `SamplingParams.extra_args` whose value is the request's `JobRow`.
ROW = "nemo_rl_row"
# Logits drawn from at a time: keeps the sampler's tables, of 8 bytes per token of the vocabulary, below 256 MiB.
_MAX_LOGITS = 2**25


class Draws:
    """The draws of one generation request: holds its uniforms and collects its log-probabilities.

    Args:
        request: The rows to draw for, and the seed.
        num_tokens: Most tokens per row.
        sampler: Draws tokens.

    Attributes:
        weights_version: Version of the weights that draw now. Whoever loads weights sets it.
        first_versions: For each row, the version of the weights that drew its first token.
    """

    def __init__(self, request: GenerationRequest, *, num_tokens: int, sampler: Sampler) -> None:
        rows = request.random_rows()
        # One extra token: an engine that plans ahead draws once more before it knows that a row has ended.
        self._uniforms = row_uniforms(request.seed, rows, num_tokens + 1)
        # On the device of the logits. On a GPU, it must be allocated by the thread that draws, in its CUDA stream.
        self._logprobs: torch.Tensor | None = None
        self._sampler = sampler
        self.weights_version = 0
        self.first_versions = [0] * len(rows)

    def draw(self, logits: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
        """Draw token `columns[b]` of row `rows[b]` from logits [B, V] float32; returns [B] int64.

        vLLM also asks for rows whose prompt is not fully read yet, and asks again later: the last draw counts.
        """
        if self._logprobs is None:
            self._logprobs = torch.zeros(2, *self._uniforms.shape, device=logits.device)
        row, column = torch.tensor(rows), torch.tensor(columns)
        uniforms = self._uniforms[row, column].to(logits.device, non_blocking=True)
        for row_index, column_index in zip(rows, columns, strict=True):
            if column_index == 0:
                self.first_versions[row_index] = self.weights_version
        parts = []
        size = max(1, _MAX_LOGITS // logits.shape[1])
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            drawn = self._sampler.draw(logits[part], uniforms[part])
            self._logprobs[:, row[part], column[part]] = torch.stack([drawn.logprobs, drawn.sampling_logprobs])
            parts.append(drawn.tokens)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def logprobs(self, row: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two log-probabilities of a row's first tokens, as in `GenerationResult`; [num_tokens] each."""
        assert self._logprobs is not None, "no token has been drawn"
        logprobs, sampling_logprobs = self._logprobs[:, row, :num_tokens].cpu()
        return logprobs, sampling_logprobs


@dataclass(frozen=True, eq=False)
class JobRow:
    """One row of a request of the job, and the proof that a vLLM request belongs to the job.

    The object itself is in `SamplingParams.extra_args` and never leaves this process. An HTTP client can send any JSON
    there (`vllm_xargs`), but JSON never becomes a `JobRow`. So no client can name a row of the job.

    Attributes:
        draws: Draws the row's tokens and collects their log-probabilities.
        index: The row's index in its request.
    """

    draws: Draws
    index: int

    def __reduce__(self) -> NoReturn:
        raise TypeError("a JobRow cannot be copied or pickled: its draws would be lost in the copy")


def job_row(extra_args: Mapping[str, Any] | None) -> JobRow | None:
    """Return the row of the job that a vLLM request is for. None: the request is not the job's."""
    row = (extra_args or {}).get(ROW)
    return row if isinstance(row, JobRow) else None


def draw_rows(logits: torch.Tensor, rows: Sequence[JobRow], columns: Sequence[int]) -> torch.Tensor:
    """Draw token `columns[b]` of `rows[b]` from logits [B, V] float32; returns [B] int64."""
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for draws in {row.draws for row in rows}:
        places = [place for place, row in enumerate(rows) if row.draws is draws]
        covers_all = len(places) == len(rows)
        chosen = slice(None) if covers_all else torch.tensor(places, device=logits.device)
        indices, token_indices = [rows[place].index for place in places], [columns[place] for place in places]
        tokens[chosen] = draws.draw(logits[chosen], indices, token_indices)
    return tokens
