"""The losses of distillation against formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_rl.algorithms.config import LossConfig
from nemo_rl.algorithms.distillation_losses import SampledTokensLoss, TopTokensLoss

VOCABULARY, ROWS, WIDTH = 7, 3, 5
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).double()
SAMPLES = torch.tensor([1.0, 1.0, 0.0]).double()  # the last row does not count
COUNTED = MASK * SAMPLES[:, None]
NUM_TOKENS = COUNTED[:, 1:].sum()


def models(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [b, T], and log-probabilities [b, T, V] of student (with gradient) and teacher."""
    draws = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (ROWS, WIDTH), generator=draws)
    student, teacher = (
        torch.randn(ROWS, WIDTH, VOCABULARY, dtype=torch.float64, generator=draws).mul(2).log_softmax(-1)
        for _ in range(2)
    )
    return tokens, student.requires_grad_(), teacher


def at(logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logprobs.gather(-1, tokens[..., None])[..., 0]


def masks(**batch: torch.Tensor) -> dict[str, Any]:
    return {"token_mask": MASK, "sample_mask": SAMPLES, **batch}


def call(loss_fn: Any, logprobs: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute a loss after garbage has been written wherever nothing counts."""
    garbage = logprobs.new_tensor(-torch.inf)
    counted = (COUNTED > 0).view(*COUNTED.shape, *(1 for _ in logprobs.shape[2:]))
    batch = {key: torch.where(counted, value, garbage) if "logprobs" in key else value for key, value in batch.items()}
    return loss_fn(torch.where(counted, logprobs, garbage), batch, NUM_TOKENS, SAMPLES.sum())


def sampled_loss(**config: Any) -> SampledTokensLoss:
    return SampledTokensLoss(LossConfig(**{"importance_correction": "none", **config}))


@pytest.mark.parametrize("objective", ["clip", "reinforce"])
def test_sampled_tokens_have_the_log_ratio_as_advantage(objective: str) -> None:
    tokens, student, teacher = models()
    logprobs = at(student, tokens)
    batch = masks(teacher_logprobs=at(teacher, tokens))
    loss, metrics = call(sampled_loss(objective=objective), logprobs, batch)
    difference = ((at(teacher, tokens) - logprobs.detach()) * COUNTED)[:, 1:]
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    (expected,) = torch.autograd.grad(-(difference * logprobs[:, 1:]).sum() / NUM_TOKENS, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert metrics["kl_to_teacher"].item() == pytest.approx(-difference.sum().item() / NUM_TOKENS.item())
    teachers = (at(teacher, tokens) * COUNTED)[:, 1:].sum() / NUM_TOKENS
    assert metrics["teacher_logprob"].item() == pytest.approx(teachers.item())


def test_previous_policy_decides_the_advantage_of_later_updates() -> None:
    tokens, student, teacher = models()
    _, previous, _ = models(seed=1)
    logprobs, old = at(student, tokens), at(previous.detach(), tokens)
    batch = masks(teacher_logprobs=at(teacher, tokens), prev_logprobs=old)
    loss, _ = call(sampled_loss(clip_ratio_low=1.0, clip_ratio_high=1e6), logprobs, batch)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    surrogate = (logprobs - old).exp() * (at(teacher, tokens) - old)
    (expected,) = torch.autograd.grad(-(surrogate * COUNTED)[:, 1:].sum() / NUM_TOKENS, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_expected_gradient_of_sampled_tokens_is_that_of_the_reverse_kl() -> None:
    """The expectation over the next token is a sum over the vocabulary, weighted by its probability."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(VOCABULARY, dtype=torch.float64, generator=draws).requires_grad_()
    teacher = torch.randn(VOCABULARY, dtype=torch.float64, generator=draws).log_softmax(-1)
    student = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)
    one = torch.ones(1, dtype=torch.float64)
    batch = {"token_mask": torch.tensor([[0.0, 1.0]]).double(), "sample_mask": one}
    expected, kl = torch.zeros_like(logits), 0.0
    for token in range(VOCABULARY):
        values = [torch.stack([torch.zeros_like(one[0]), model[token]])[None] for model in (student, teacher)]
        loss, metrics = sampled_loss()(values[0], batch | {"teacher_logprobs": values[1]}, one[0], one[0])
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        probability = student[token].exp().item()
        expected += probability * gradient
        kl += probability * metrics["kl_to_teacher"].item()
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-12)
    assert kl == pytest.approx((student.exp() * (student - teacher)).sum().item())


def outcomes(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return [b, T, K + 1]: log-probabilities of K tokens, and of the others together."""
    others = torch.ones_like(logprobs, dtype=torch.bool).scatter(-1, ids, False)
    rest = logprobs.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], -1)


def divergence(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the formula of the docstring for log-probabilities [..., outcomes], by plain probabilities."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    p, q = p.exp(), q.exp()
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 3, VOCABULARY - 1])
def test_top_tokens_equal_the_formula(beta: float, k: int) -> None:
    _, student, teacher = models()
    ids = teacher.topk(k).indices
    log_p, log_q = outcomes(teacher, ids), outcomes(student, ids)
    loss, metrics = call(TopTokensLoss(beta), log_q, masks(teacher_top_logprobs=log_p))
    expected = (divergence(log_p, log_q, beta) * COUNTED)[:, 1:].sum() / NUM_TOKENS
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)

    def mean(values: torch.Tensor) -> float:
        return float((values.detach() * COUNTED)[:, 1:].sum() / NUM_TOKENS)

    q = log_q.exp()
    assert metrics["kl_to_teacher"].item() == pytest.approx(mean(divergence(log_p, log_q, 1.0)))
    assert metrics["teacher_logprob"].item() == pytest.approx(mean((q * log_p).sum(-1)))
    assert metrics["entropy_estimate"].item() == pytest.approx(mean(-(q * log_q).sum(-1)))
    assert metrics["teacher_top_mass"].item() == pytest.approx(mean(log_p[..., :-1].exp().sum(-1)))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_merged_outcomes_bound_the_divergence_from_below(beta: float) -> None:
    """With K = V - 1 the other tokens are one token, and the loss is the divergence over the whole vocabulary."""
    _, student, teacher = models()
    whole = (divergence(teacher, student, beta) * COUNTED)[:, 1:].sum().item() / NUM_TOKENS.item()
    losses = []
    for k in range(1, VOCABULARY):
        ids = teacher.topk(k).indices
        batch = masks(teacher_top_logprobs=outcomes(teacher, ids))
        losses.append(call(TopTokensLoss(beta), outcomes(student, ids), batch)[0].item())
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(whole)
