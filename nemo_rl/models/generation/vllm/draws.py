"""Sampling for vLLM: the tokens are drawn by `nemo_rl.models.generation.sampling`, as with every other backend.

vLLM returns the log-probability of a sampled token either before or after top-k and top-p, not both, and it draws
requests with seeds one by one. Here a logits processor (vLLM's extension point for sampling) draws the whole batch at
once from the rows' own random streams, records both log-probabilities, and leaves vLLM a single possible token, which
vLLM takes greedily.

::

    engine step ──► logits [B, V] ──► RowSampler.apply ──► one finite logit per row ──► argmax
                                          │   ▲
                     log-probabilities,   ▼   │ uniform of (seed, row, token index)
                     by row and index    Draws, one per request
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from nemo_rl.models.generation.interfaces import GenerationRequest
from nemo_rl.models.generation.sampling import Sampler, row_uniforms

# Key in `SamplingParams.extra_args`: the row of the current `GenerationRequest`.
ROW = "nemo_rl_row"
# Logits drawn from at a time: keeps the sampler's tables, of 8 bytes per token of the vocabulary, below 256 MiB.
_MAX_LOGITS = 2**25


class Draws:
    """The draws of one generation request: holds its uniforms and collects its log-probabilities.

    Args:
        request: The rows to draw for, and the seed.
        num_tokens: Most tokens per row.
        sampler: Draws tokens.
        weights_version: Version of the weights at the start.
        device: Where tokens are drawn.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        num_tokens: int,
        sampler: Sampler,
        weights_version: int,
        device: torch.device,
    ) -> None:
        first_row = request.first_prompt * request.num_generations
        num_rows = request.num_prompts * request.num_generations
        # One extra token: an engine that plans ahead draws once more before it knows that a row has ended.
        width = num_tokens + 1
        self._uniforms = row_uniforms(request.seed, np.arange(first_row, first_row + num_rows), width)
        self._logprobs = torch.zeros(2, num_rows, width, device=device)
        self._sampler = sampler
        # Version of the weights that draw now, and of those that drew each row's first token.
        self.weights_version = weights_version
        self.first_versions = [weights_version] * num_rows

    def draw(self, logits: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
        """Draw token `columns[b]` of row `rows[b]` from logits [B, V] float32; returns [B] int64.

        vLLM also asks for rows whose prompt is not fully read yet, and asks again later: the last draw counts.
        """
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
        logprobs, sampling_logprobs = self._logprobs[:, row, :num_tokens].cpu()
        return logprobs, sampling_logprobs


class RowSampler(LogitsProcessor):
    """Draws the tokens of vLLM requests that carry `ROW`; vLLM samples all others itself."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.draws: Draws | None = None
        # Place in vLLM's batch -> the request's row, and its tokens so far (vLLM's own list, which grows).
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
        covers_batch = len(places) == len(logits)
        chosen = logits if covers_batch else logits[places]
        tokens = self.draws.draw(chosen, list(rows), [len(output) for output in outputs])
        only_token = torch.full_like(chosen, float("-inf")).scatter_(1, tokens[:, None], 0.0)
        if covers_batch:
            return only_token
        logits[places] = only_token
        return logits


def _request(params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> tuple[int, list[int]] | None:
    row = (params.extra_args or {}).get(ROW)
    return None if row is None else (row, output_ids)
