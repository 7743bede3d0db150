"""Builds a `GenerationResult` from completions, selects rows of one, and joins those of several workers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_rl.errors import ModelError
from nemo_rl.models.generation.interfaces import GenerationResult

_TENSORS = ("output_ids", "output_lengths", "prompt_lengths", "logprobs", "sampling_logprobs", "truncated")
# Any token works: no real token attends to padding.
PADDING = 0


@dataclass(frozen=True)
class Completion:
    """One completion of n tokens.

    Attributes:
        tokens: [n] int64.
        logprobs, sampling_logprobs: [n] float32, as in `GenerationResult`.
        truncated: Whether the length limit ended the completion.
        experts: [prompt + n - 1, L * K] int16, as in `GenerationResult`, or None.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    sampling_logprobs: torch.Tensor
    truncated: bool
    experts: torch.Tensor | None = None


def make_result(
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    *,
    tokenizer: Any,
    weights_version: int,
    where: str,
) -> GenerationResult:
    """Lay out one completion per prompt as the rows of a result.

    Args:
        prompts: Tokens of each row's prompt.
        completions: The completion of each row.
        tokenizer: Decodes the completions.
        weights_version: Version of the weights that generated them.
        where: The generator's name, for messages.

    Raises:
        ModelError: A log-probability is not finite.
    """
    starts = [len(prompt) for prompt in prompts]
    ends = [start + len(row.tokens) for start, row in zip(starts, completions, strict=True)]
    width = max(ends, default=0)
    # Filled for all rows at once: row by row, a thousand short completions would take longer than to generate them.
    column = torch.arange(width)
    in_prompt = column < torch.tensor(starts, dtype=torch.int64)[:, None]
    in_completion = ~in_prompt & (column < torch.tensor(ends, dtype=torch.int64)[:, None])
    output_ids = torch.full((len(prompts), width), PADDING)
    output_ids[in_prompt] = torch.tensor(list(itertools.chain.from_iterable(prompts)), dtype=torch.int64)
    logprobs, sampling_logprobs = torch.zeros(2, len(prompts), width)
    if completions:
        output_ids[in_completion] = torch.cat([row.tokens for row in completions])
        logprobs[in_completion] = torch.cat([row.logprobs for row in completions])
        sampling_logprobs[in_completion] = torch.cat([row.sampling_logprobs for row in completions])
    if not torch.isfinite(logprobs).all():
        raise ModelError(f"{where}: the model with weights of version {weights_version} produces non-finite logits")
    return GenerationResult(
        output_ids=output_ids,
        output_lengths=torch.tensor(ends, dtype=torch.int64),
        prompt_lengths=torch.tensor(starts, dtype=torch.int64),
        logprobs=logprobs,
        sampling_logprobs=sampling_logprobs,
        truncated=torch.tensor([row.truncated for row in completions], dtype=torch.bool),
        texts=_texts([row.tokens.tolist() for row in completions], tokenizer),
        weights_version=weights_version,
        routed_experts=_padded_experts([row.experts for row in completions], width),
    )


def _texts(completions: Sequence[list[int]], tokenizer: Any) -> list[str]:
    """Decode completions, equal ones once."""
    decoded: dict[tuple[int, ...], str] = {}
    texts = []
    for tokens in completions:
        key = tuple(tokens)
        if key not in decoded:
            decoded[key] = tokenizer.decode(tokens, skip_special_tokens=True)
        texts.append(decoded[key])
    return texts


def _padded_experts(rows: Sequence[torch.Tensor | None], width: int) -> torch.Tensor | None:
    known = [row for row in rows if row is not None]
    if not known:
        return None
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, width - len(row))) for row in known])


def select(result: GenerationResult, rows: Sequence[int]) -> GenerationResult:
    """Return some rows of a result, in the order given."""
    chosen = list(rows)
    return replace(
        result,
        **{name: getattr(result, name)[chosen] for name in _TENSORS},
        texts=[result.texts[row] for row in chosen],
        routed_experts=None if result.routed_experts is None else result.routed_experts[chosen],
    )


def join(results: Sequence[GenerationResult]) -> GenerationResult:
    """Join the results of consecutive prompts, padded to the longest completion."""
    first = results[0]
    if len(results) == 1:
        return first
    width = max(result.output_ids.shape[1] for result in results)

    def padded(name: str) -> torch.Tensor:
        tensors = [getattr(result, name) for result in results]
        return torch.cat([torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    def concatenated(name: str) -> torch.Tensor:
        return torch.cat([getattr(result, name) for result in results])

    return GenerationResult(
        output_ids=padded("output_ids"),
        output_lengths=concatenated("output_lengths"),
        prompt_lengths=concatenated("prompt_lengths"),
        logprobs=padded("logprobs"),
        sampling_logprobs=padded("sampling_logprobs"),
        truncated=concatenated("truncated"),
        texts=[text for result in results for text in result.texts],
        weights_version=min(result.weights_version for result in results),
        routed_experts=_joined_experts([result.routed_experts for result in results], width),
    )


def _joined_experts(parts: Sequence[torch.Tensor | None], width: int) -> torch.Tensor | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in known])
