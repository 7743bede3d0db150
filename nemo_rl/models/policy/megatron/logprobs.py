"""Log-probabilities of given tokens from logits whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from nemo_rl.models.policy.logprob_forward import row_chunks, scaled


def vocabulary_parallel_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, vocabulary: int, group: dist.ProcessGroup, temperature: float = 1.0
) -> torch.Tensor:
    """Compute log softmax(logits / temperature)[n, tokens[n]]; ranks reduce three numbers per token, no logits.

    The computation is in float32, one chunk of rows at a time. The backward pass allocates one more buffer of the size
    and dtype of the local logits and needs no communication.

    Args:
        logits: [N, V / ranks], any floating dtype: this rank's share of the (padded) vocabulary.
        tokens: [N] int64, the same on all ranks.
        vocabulary: size of the vocabulary; columns beyond it are padding and get no gradient.
        group: the tensor-parallel ranks.
        temperature: greater than 0.

    Returns:
        [N] float32, the same on all ranks, differentiable with respect to `logits`. The incoming gradient must be the
        same on all ranks, too.
    """
    start = group.rank() * logits.shape[-1]
    counted = min(max(vocabulary - start, 0), logits.shape[-1])
    result: torch.Tensor = _VocabularyParallelLogprobs.apply(logits, tokens, start, counted, temperature, group)
    return result


class _VocabularyParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        start: int,
        counted: int,
        temperature: float,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        is_local = (tokens >= start) & (tokens < start + counted)
        columns = torch.where(is_local, tokens - start, 0)
        largest = torch.full(tokens.shape, -torch.inf, dtype=torch.float32, device=logits.device)
        # Row 0: sum of exponentials; row 1: the logit of the token, which one rank has.
        sums = torch.zeros(2, *tokens.shape, dtype=torch.float32, device=logits.device)
        chunks = row_chunks(logits)
        if counted:
            for rows in chunks:
                largest[rows] = scaled(logits[rows, :counted].amax(dim=-1).float(), temperature)
        _reduce(largest, dist.ReduceOp.MAX, group)
        if counted:
            for rows in chunks:
                chunk = scaled(logits[rows, :counted].float(), temperature) - largest[rows, None]
                sums[1, rows] = chunk.gather(-1, columns[rows, None]).squeeze(-1)
                sums[0, rows] = chunk.exp_().sum(dim=-1)
        sums[1].masked_fill_(~is_local, 0.0)
        _reduce(sums, dist.ReduceOp.SUM, group)
        log_sums = sums[0].log()
        ctx.save_for_backward(logits, columns, is_local, largest + log_sums)
        ctx.counted, ctx.temperature = counted, temperature
        return sums[1] - log_sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        logits, columns, is_local, normalizers = ctx.saved_tensors
        (gradient,) = gradients
        logits_gradient = torch.empty_like(logits)
        logits_gradient[:, ctx.counted :] = 0.0
        for rows in row_chunks(logits) if ctx.counted else []:
            # d logprob / d logits = (onehot(token) - softmax(logits / temperature)) / temperature
            weight = scaled(gradient[rows, None], ctx.temperature)
            chunk = scaled(logits[rows, : ctx.counted].float(), ctx.temperature) - normalizers[rows, None]
            chunk = chunk.exp_().mul_(-weight)
            logits_gradient[rows, : ctx.counted] = chunk.scatter_add_(
                -1, columns[rows, None], weight * is_local[rows, None]
            )
        return logits_gradient, None, None, None, None, None


def _reduce(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)
