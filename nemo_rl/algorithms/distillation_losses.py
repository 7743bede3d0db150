"""Losses of on-policy distillation over one micro-batch. `LossFunction` of `models.policy.interfaces` is the interface.

The student pi has sampled the tokens; p is the teacher. Both are distributions of the next token, given the same tokens
before it. This module imports only torch and its neighbour, because a loss is sent to policy workers in any venv.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl.algorithms.loss_functions import ClippedPGLoss, counted_tokens

if TYPE_CHECKING:
    from nemo_rl.algorithms.config import LossConfig

_MAX_ADVANTAGE = 20.0


class SampledTokensLoss:
    """Minimizes KL(pi || p) at the sampled tokens, as a policy gradient with an advantage for each token.

    The advantage of token t is A_t = log p(t) - log pi_prev(t), where pi_prev is the policy before the step, as in
    `ClippedPGLoss`. For tokens sampled from pi, the expectation of -A_t grad log pi(t) is the gradient of KL(pi || p)
    at that position, so on average the policy gradient is that of the KL divergence, averaged over the positions that
    the student has visited. Neither paper below sends a gradient through the sampling in this form: Agarwal et al.
    (2023), "GKD", arXiv:2306.13649, equation 3 with the reverse KL divergence. Gu et al. (2023), "MiniLLM",
    arXiv:2306.08543, equation 2, add to A_t the advantages of all later tokens; the gradient is then that of the
    divergence of whole completions, with a higher variance.

    A_t is clamped to +-20, as every log-ratio of two policies in `ClippedPGLoss`. Clipping, aggregation, importance
    weights for older samples, and a KL term to the initial policy are those of `ClippedPGLoss`.

    Metrics: those of `ClippedPGLoss`, and as means over tokens
        kl_to_teacher: log pi_prev - log p; unbiased for KL(pi || p) if the tokens were sampled from pi.
        teacher_logprob: log p.

    Args:
        config: the section `loss`.
    """

    def __init__(self, config: LossConfig) -> None:
        self._policy_gradient = ClippedPGLoss(config)

    def __call__(
        self,
        logprobs: torch.Tensor,
        batch: Mapping[str, Any],
        global_num_tokens: torch.Tensor,
        global_num_samples: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss and metrics of one micro-batch. See `LossFunction` for the arguments."""
        counted = counted_tokens(batch)
        teacher = torch.where(counted, batch["teacher_logprobs"].to(logprobs), 0.0)
        previous = torch.where(counted, batch.get("prev_logprobs", logprobs).detach().to(logprobs), 0.0)
        differences = teacher - previous
        advantages = differences.clamp(-_MAX_ADVANTAGE, _MAX_ADVANTAGE)
        loss, metrics = self._policy_gradient(
            logprobs, {**batch, "advantages": advantages}, global_num_tokens, global_num_samples
        )
        num_tokens = torch.clamp(global_num_tokens.to(logprobs.device), min=1)
        return loss, metrics | {
            "kl_to_teacher": -differences[:, 1:].sum() / num_tokens,
            "teacher_logprob": teacher[:, 1:].sum() / num_tokens,
        }


class TopTokensLoss:
    """Minimizes a divergence of pi and p over the teacher's K most probable tokens, and all other tokens together.

    With P and Q, the probabilities of these K + 1 outcomes under teacher and student, the loss of a position is the
    generalized Jensen-Shannon divergence of Agarwal et al. (2023), "GKD", arXiv:2306.13649, equation 1:

        JSD(beta)   beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q
        beta = 1    KL(Q || P), the reverse KL divergence: the student prefers what the teacher does most
        beta = 0    KL(P || Q), the forward KL divergence: the student covers all that the teacher does

    At beta = 0 and 1 the JSD itself is 0; these values stand for its limits, divided by beta and by 1 - beta, as in
    TRL's `GKDTrainer`. The loss is the mean over all counted tokens of the optimizer batch. It is exact, with no
    variance from sampling the next token, and no gradient passes through the sampling of the tokens before it.

    The remaining probability is an outcome of its own and not cut off by renormalizing P and Q to the K tokens.
    Renormalized, the loss would not see how much probability the student leaves to other tokens, and the student would
    learn too confident probabilities: a bias that Anshumann et al. (2025), "Sparse Logit Sampling", arXiv:2503.16870,
    prove and measure. With the remainder, the loss is 0 only if the student gives all K tokens the teacher's
    probabilities; and as a divergence of merged outcomes it never exceeds that over the whole vocabulary (Cover &
    Thomas (2006), "Elements of Information Theory", the data processing inequality).

    Metrics, means over tokens, of distributions over the K + 1 outcomes:
        kl_to_teacher: KL(Q || P), with any beta.
        teacher_logprob: expectation of log P under Q.
        entropy_estimate: entropy of Q, at most that of pi.
        teacher_top_mass: probability of the K tokens under the teacher; if it is far from 1, raise K.

    Args:
        beta: from 0 to 1.

    Example:
        >>> import torch
        >>> uniform = torch.full((1, 2, 3), 1 / 3).log()
        >>> batch = {
        ...     "token_mask": torch.tensor([[0.0, 1.0]]),
        ...     "sample_mask": torch.ones(1),
        ...     "teacher_top_logprobs": uniform,
        ... }
        >>> loss, _ = TopTokensLoss(beta=1.0)(uniform, batch, torch.tensor(1), torch.tensor(1))
        >>> loss.item()
        0.0
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def __call__(
        self,
        logprobs: torch.Tensor,
        batch: Mapping[str, Any],
        global_num_tokens: torch.Tensor,
        global_num_samples: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss and metrics of one micro-batch. See `LossFunction` for the arguments."""
        counted = counted_tokens(batch)[:, 1:, None]
        teacher = batch["teacher_top_logprobs"].to(logprobs)
        # Masked positions must reach neither the value nor the gradient.
        log_p, log_q = (torch.where(counted, values[:, 1:], 0.0) for values in (teacher, logprobs))
        num_tokens = torch.clamp(global_num_tokens.to(logprobs.device), min=1)
        loss = self._divergence(log_p, log_q).sum() / num_tokens
        q = torch.where(counted, log_q.detach().exp(), 0.0)
        p = torch.where(counted, log_p.exp(), 0.0)
        return loss, {
            "kl_to_teacher": (q * (log_q.detach() - log_p)).sum() / num_tokens,
            "teacher_logprob": (q * log_p).sum() / num_tokens,
            "entropy_estimate": -(q * log_q.detach()).sum() / num_tokens,
            "teacher_top_mass": p[..., :-1].sum() / num_tokens,
        }

    def _divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """Return the terms of the divergence, [b, T-1, K+1]. They are 0 where all log-probabilities are 0."""
        beta = self._beta
        if beta == 1:
            return log_q.exp() * (log_q - log_p)
        if beta == 0:
            return log_p.exp() * (log_p - log_q)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
