"""Log-probabilities of given tokens from logits, without a float32 copy of all logits."""

from __future__ import annotations

from typing import Any

import torch

# Logits that are held in float32 at a time: 2**24 are 64 MiB.
CHUNK_ELEMENTS = 2**24


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[n, tokens[n]], computed in float32 a chunk of rows at a time.

    Besides the logits themselves, the backward pass takes one more buffer of their size and dtype (their gradient);
    neither pass holds more than `CHUNK_ELEMENTS` elements in float32.

    Args:
        logits: [N, V], any floating dtype.
        tokens: [N] int64.

    Returns:
        [N] float32, differentiable with respect to `logits`.
    """
    result: torch.Tensor = _TokenLogprobs.apply(logits, tokens)
    return result


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logprobs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
        normalizers = torch.empty_like(logprobs)
        for rows in row_chunks(logits):
            chunk = logits[rows].float()
            normalizers[rows] = torch.logsumexp(chunk, dim=-1)
            logprobs[rows] = chunk.gather(-1, tokens[rows, None]).squeeze(-1)
        logprobs -= normalizers
        ctx.save_for_backward(logits, tokens, normalizers)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, tokens, normalizers = ctx.saved_tensors
        (gradient,) = gradients
        of_logits = torch.empty_like(logits)
        for rows in row_chunks(logits):
            # d logprob / d logits = onehot(token) - softmax(logits)
            weight = gradient[rows, None]
            chunk = (logits[rows].float() - normalizers[rows, None]).exp_().mul_(-weight)
            of_logits[rows] = chunk.scatter_add_(-1, tokens[rows, None], weight)
        return of_logits, None


def row_chunks(logits: torch.Tensor) -> list[slice]:
    """Slices of rows of [N, V] logits, of at most `CHUNK_ELEMENTS` elements each."""
    num_rows, vocabulary = logits.shape
    size = max(1, CHUNK_ELEMENTS // max(1, vocabulary))
    return [slice(start, start + size) for start in range(0, num_rows, size)]
