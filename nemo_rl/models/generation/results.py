"""Completions, row by row, as one `GenerationResult`; and the results of several workers as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_rl.errors import ModelError
from nemo_rl.models.generation.interfaces import GenerationResult

_TENSORS = ("output_ids", "output_lengths", "prompt_lengths", "logprobs", "sampling_logprobs", "truncated")
# Any token will do: no real token looks at padding.
PADDING = 0


@dataclass(frozen=True)
class Completion:
    """One row's tokens [n] int64 with their log-probabilities [n] float32, and whether the length limit ended it."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    sampling_logprobs: torch.Tensor
    truncated: bool


def make_result(
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    *,
    tokenizer: Any,
    weights_version: int,
    where: str,
) -> GenerationResult:
    """One completion per prompt, laid out in rows.

    Raises:
        ModelError: a log-probability is not finite; `where` says in the message who generated it.
    """
    ends = [len(prompt) + len(row.tokens) for prompt, row in zip(prompts, completions, strict=True)]
    width = max(ends, default=0)
    output_ids = torch.full((len(prompts), width), PADDING)
    logprobs, sampling_logprobs = torch.zeros(2, len(prompts), width)
    for index, (prompt, row, end) in enumerate(zip(prompts, completions, ends, strict=True)):
        start = len(prompt)
        output_ids[index, :start] = torch.tensor(prompt)
        output_ids[index, start:end] = row.tokens
        logprobs[index, start:end] = row.logprobs
        sampling_logprobs[index, start:end] = row.sampling_logprobs
    if not torch.isfinite(logprobs).all():
        raise ModelError(f"{where}: the model with weights of version {weights_version} gives no finite logits")
    return GenerationResult(
        output_ids=output_ids,
        output_lengths=torch.tensor(ends, dtype=torch.int64),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
        logprobs=logprobs,
        sampling_logprobs=sampling_logprobs,
        truncated=torch.tensor([row.truncated for row in completions], dtype=torch.bool),
        texts=[tokenizer.decode(row.tokens.tolist(), skip_special_tokens=True) for row in completions],
        weights_version=weights_version,
    )


def select(result: GenerationResult, rows: Sequence[int]) -> GenerationResult:
    """Some rows of a result, in the order given."""
    chosen = list(rows)
    return replace(
        result,
        **{name: getattr(result, name)[chosen] for name in _TENSORS},
        texts=[result.texts[row] for row in chosen],
    )


def join(results: Sequence[GenerationResult]) -> GenerationResult:
    """Results of consecutive prompts as one, padded to the longest completion."""
    first = results[0]
    if len(results) == 1:
        return first
    width = max(result.output_ids.shape[1] for result in results)

    def rows(name: str) -> torch.Tensor:
        tensors = [getattr(result, name) for result in results]
        return torch.cat([torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    def column(name: str) -> torch.Tensor:
        return torch.cat([getattr(result, name) for result in results])

    return GenerationResult(
        output_ids=rows("output_ids"),
        output_lengths=column("output_lengths"),
        prompt_lengths=column("prompt_lengths"),
        logprobs=rows("logprobs"),
        sampling_logprobs=rows("sampling_logprobs"),
        truncated=column("truncated"),
        texts=[text for result in results for text in result.texts],
        weights_version=min(result.weights_version for result in results),
    )
