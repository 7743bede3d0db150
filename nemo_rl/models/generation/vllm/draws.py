"""Which tokens vLLM takes: those of `nemo_rl.models.generation.sampling`, as with every other backend.

vLLM gives the log-probability of a sampled token either before or after temperature, top-k and top-p, not both, and
its per-request seeds are drawn from one by one. Here a logits processor, vLLM's own way to extend sampling, draws the
whole batch at once from the rows' own streams of random numbers, notes both log-probabilities, and leaves vLLM a
single possible token, which it takes greedily.

::

    engine step ──► logits [B, V] ──► RowSampler.apply ──► one finite logit per row ──► argmax
                                          │   ▲
                     log-probabilities,   ▼   │ uniform of (seed, row, token index)
                     by row and index    Draws, one per call
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from nemo_rl.models.generation.sampling import Sampler, row_uniforms

# Which row of the current call a request is; in `SamplingParams.extra_args`.
ROW = "nemo_rl_row"
# Rows drawn for at a time: the sampler's tables, of 8 bytes per token of the vocabulary, are to stay below 256 MiB.
_MAX_LOGITS = 2**25


class Draws:
    """The draws of one call: uniforms in, log-probabilities out."""

    def __init__(
        self,
        *,
        seed: int,
        first_row: int,
        num_rows: int,
        num_tokens: int,
        sampler: Sampler,
        weights_version: int,
        device: torch.device,
    ) -> None:
        """Args: see `sampling.row_uniforms`; the rows are `first_row` to `first_row + num_rows - 1` of the call."""
        # One more than asked for: an engine that plans ahead draws once more before it learns that a row has ended.
        width = num_tokens + 1
        self._uniforms = row_uniforms(seed, np.arange(first_row, first_row + num_rows), width)
        self._logprobs = torch.zeros(2, num_rows, width, device=device)
        self._sampler = sampler
        # Of the weights that draw now, and of those that drew each row's first token.
        self.weights_version = weights_version
        self.first_versions = [weights_version] * num_rows

    def draw(self, logits: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
        """Token `columns[b]` of row `rows[b]` from logits [B, V] float32; [B] int64.

        A row whose prompt has not been read to its end is drawn for, too, and again later: the last draw counts.
        """
        row, column = torch.tensor(rows), torch.tensor(columns)
        uniforms = self._uniforms[row, column].to(logits.device, non_blocking=True)
        for started in (position for position, index in zip(rows, columns, strict=True) if index == 0):
            self.first_versions[started] = self.weights_version
        parts = []
        size = max(1, _MAX_LOGITS // logits.shape[1])
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            drawn = self._sampler.draw(logits[part], uniforms[part])
            self._logprobs[:, row[part], column[part]] = torch.stack([drawn.logprobs, drawn.sampling_logprobs])
            parts.append(drawn.tokens)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def logprobs(self, row: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the first tokens of a row: untransformed, and as sampled; [num_tokens] float32 each, on the CPU."""
        untransformed, sampled = self._logprobs[:, row, :num_tokens].cpu()
        return untransformed, sampled


class RowSampler(LogitsProcessor):
    """Draws for the requests that carry `ROW`; vLLM samples all others by itself."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.draws: Draws | None = None
        # Place in the batch -> the request's row, and its tokens so far (vLLM's own list, which grows).
        self._requests: dict[int, tuple[int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, _request)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.draws is None or not self._requests:
            return logits
        places = sorted(place for place in self._requests if place < len(logits))
        rows, outputs = zip(*(self._requests[place] for place in places), strict=True)
        covers_all = len(places) == len(logits)
        chosen = logits if covers_all else logits[places]
        tokens = self.draws.draw(chosen, list(rows), [len(output) for output in outputs])
        certain = torch.full_like(chosen, float("-inf")).scatter_(1, tokens[:, None], 0.0)
        if covers_all:
            return certain
        logits[places] = certain
        return logits


def _request(params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> tuple[int, list[int]] | None:
    row = (params.extra_args or {}).get(ROW)
    return None if row is None else (row, output_ids)
