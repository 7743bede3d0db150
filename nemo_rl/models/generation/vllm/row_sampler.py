"""vLLM's extension point for sampling: draws the tokens of the job's requests, and of no others."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from nemo_rl.models.generation.vllm.draws import JobRow, draw_rows, job_row


class RowSampler(LogitsProcessor):
    """Draws the tokens of vLLM requests that carry a `JobRow`; vLLM samples all others itself."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        # Place in vLLM's batch -> the request's row, and its tokens so far (vLLM's own list, which grows).
        self._requests: dict[int, tuple[JobRow, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, _request)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        places = sorted(place for place in self._requests if place < len(logits))
        if not places:
            return logits
        rows, outputs = zip(*(self._requests[place] for place in places), strict=True)
        covers_batch = len(places) == len(logits)
        chosen = logits if covers_batch else logits[places]
        tokens = draw_rows(chosen, rows, [len(output) for output in outputs])
        only_token = torch.full_like(chosen, float("-inf")).scatter_(1, tokens[:, None], 0.0)
        if covers_batch:
            return only_token
        logits[places] = only_token
        return logits


def _request(params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> tuple[JobRow, list[int]] | None:
    row = job_row(params.extra_args)
    return None if row is None else (row, output_ids)
