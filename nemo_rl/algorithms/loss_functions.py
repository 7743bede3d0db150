"""Losses over one micro-batch. `nemo_rl.models.policy.interfaces.LossFunction` defines the interface.

This module imports only torch, because a loss is sent to policy workers in any venv.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nemo_rl.algorithms.config import LossConfig

_MAX_LOG_RATIO = 20.0
_MAX_KL = 10.0


@dataclass(frozen=True)
class _Tokens:
    """A micro-batch without position 0, which has no log-probability. Tensors are [b, T-1] unless noted.

    Attributes:
        mask: 1 for counted tokens, else 0. `logprobs`, `previous` and `log_ratio` are 0 where the mask is 0.
        logprobs: log pi, with gradient.
        previous: log pi_prev.
        log_ratio: log pi / pi_prev, with gradient.
        advantages: [b, 1], or [b, T-1] if they differ by token.
    """

    mask: torch.Tensor
    logprobs: torch.Tensor
    previous: torch.Tensor
    log_ratio: torch.Tensor
    advantages: torch.Tensor


class ClippedPGLoss:
    """Computes the policy-gradient losses of PPO, GRPO, DAPO, GSPO, CISPO and REINFORCE.

    They differ in the surrogate, the aggregation, the KL term and the importance correction, which are configured
    separately. `nemo_rl.algorithms.loss_recipes` names the combinations of the papers.

    Example:
        >>> import torch
        >>> from nemo_rl.algorithms.config import LossConfig
        >>> loss_fn = ClippedPGLoss(LossConfig(importance_correction="none"))
        >>> batch = {
        ...     "token_mask": torch.tensor([[0.0, 1.0]]),
        ...     "sample_mask": torch.ones(1),
        ...     "advantages": torch.tensor([2.0]),
        ... }
        >>> loss, metrics = loss_fn(torch.tensor([[0.0, -1.0]]), batch, torch.tensor(1), torch.tensor(1))
        >>> loss.item()
        -2.0

    The formulas are per token t of sample i. pi is the policy being trained; pi_prev is the policy before the step
    (`prev_logprobs`, or pi without gradient if the batch has none); pi_gen is the generator (`generation_logprobs`);
    A is the advantage of the sample, or of the token; r = pi / pi_prev; clip(r) is r between 1 - clip_ratio_low and
    1 + clip_ratio_high; sg(x) is x without gradient:

        surrogate   "clip"       min(r A, clip(r) A)
                                 PPO: Schulman et al. (2017), arXiv:1707.06347, equation 7. Two clip ratios
                                 ("clip-higher"): DAPO, Yu et al. (2025), arXiv:2503.14476, equation 10.
                    "gspo"       the same with s instead of r, the geometric mean of r over the sample's tokens:
                                 Zheng et al. (2025), arXiv:2507.18071, equations 5 and 7.
                    "cispo"      sg(clip(r)) A log pi: clipped tokens keep their gradient. MiniMax (2025),
                                 arXiv:2506.13585, equations 4 and 5. There is no lower bound: clip_ratio_low = 1.
                    "reinforce"  A log pi: Williams (1992), "Simple Statistical Gradient-Following Algorithms".
        dual clip   max(surrogate, dual_clip * A) where A < 0: Ye et al. (2020), arXiv:1912.09729, section "Dual-clip
                    PPO". It bounds the loss of a token with A < 0 that has become much more likely.
        weight      w = pi_prev / pi_gen between importance_floor and importance_cap, a constant for the gradient: the
                    truncated importance sampling of Ionides (2008), "Truncated Importance Sampling". Yao et al. (2025),
                    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", apply it to a training and
                    a generation engine whose probabilities differ. With `importance_outside="mask"`, w is 0 outside the
                    bounds instead of equal to the bound: IcePop, Ling Team (2025), arXiv:2510.18855, equation 3.
                    With `importance_correction="sequence"`, pi_prev and pi_gen are probabilities of the completion
                    (products over its counted tokens), so all its tokens share one w.
        loss        aggregate(-w * surrogate) + kl_coef * aggregate(KL term)

    With top-p or top-k, tokens are drawn from q = pi_gen / Z (`sampling_logprobs`), where Z is the probability under
    pi_gen of the tokens that top-p and top-k keep. Then w = min(pi_prev / q, importance_cap), and the KL term has the
    weight pi_gen / q = Z. The expected loss is then that of samples of pi_gen, without the tokens that are never drawn.

    aggregate divides by *global* counts, so that the losses of micro-batches and ranks add up:

        "token"     sum over all tokens / global_num_tokens: DAPO, equation 12
        "sequence"  sum over samples of the mean over the sample's tokens / global_num_samples: GRPO, Shao et al.
                    (2024), arXiv:2402.03300, equation 3. A sample without counted tokens adds 0.
        "constant"  sum over all tokens / (constant_length x global_num_samples): Dr. GRPO, Liu et al. (2025),
                    arXiv:2503.20783, section 3.2. With 1, the mean over samples of the sum over tokens.

    KL term, with d = log pi - log pi_ref: estimators of KL(pi || pi_ref) from samples of pi, Schulman (2020),
    "Approximating KL Divergence". A good estimator of a value is not always a good loss, because the samples also
    depend on pi (Tang & Munos (2025), arXiv:2506.09477):

        "k1"  d            Unbiased, high variance, may be negative. Its plain derivative is 0 on average, so the
                           gradient used here is the score-function gradient d * grad(log pi), which equals adding
                           -kl_coef * d to the reward. Unbiased for grad KL(pi || pi_ref).
        "k2"  d^2 / 2      Biased as a value. Its derivative d * grad(log pi) is unbiased, as for k1.
        "k3"  e^-d - 1 + d Unbiased, low variance, never negative; the choice of GRPO (equation 4). Its derivative
                           (1 - e^-d) * grad(log pi) is grad KL(pi_ref || pi) on average. As a loss for
                           KL(pi || pi_ref) it is *biased*: equal to first order in d, weaker where pi has mass and
                           pi_ref has none, unbounded where pi_ref has mass and pi has none.

    "Unbiased" holds per token and for samples of pi: the KL term contains neither r nor w. With `kl_weighted`, each
    estimate is multiplied by r, with its gradient. Then the value and the gradient of every estimator except k2 are
    unbiased for samples of pi_prev: DeepSeek-AI (2025), "DeepSeek-V3.2", arXiv:2512.02556, equation 7.
    With `kl_placement` "reward" or "reward_to_go" the loss has no KL term; see `algorithms.advantages`.

    Exponentials are bounded, so that one token cannot dominate or overflow the loss: every log-ratio of two policies is
    clamped to +-20 before it is used, and every KL estimate to +-10. A clamped value has no gradient, except in k1,
    which multiplies the gradient of log pi by the clamped d. Values within the bounds are unchanged.

    Metrics (token means over `global_num_tokens` unless noted; they add up over micro-batches and ranks):
        policy_loss, kl: the two aggregates; loss = policy_loss + kl_coef * kl. `kl` is present if the batch has
            `reference_policy_logprobs`.
        ratio_mean; ratio_max, ratio_min: over tokens; -inf and inf for a micro-batch without counted tokens.
        clip_fraction_low, clip_fraction_high, clip_fraction_dual: fraction of tokens whose gradient the bound removes.
        approx_kl: k3 for KL(pi_prev || pi), the size of this update.
        entropy_estimate: -log pi of the tokens; unbiased for the entropy if the tokens were sampled from pi.
        importance_weight_mean (after the bounds), importance_truncated_fraction (outside them), importance_weight_max
            (before), generation_kl (k3 for KL(pi_gen || pi_prev)): only with importance correction.
    """

    def __init__(self, config: LossConfig) -> None:
        # Plain values, so that unpickling a loss does not import the configuration's packages.
        self.clip_low = 1.0 - config.clip_ratio_low
        self.clip_high = 1.0 + config.clip_ratio_high
        self.dual_clip = config.dual_clip
        self.objective = config.objective
        self.aggregation = config.aggregation
        self.constant_length = config.constant_length or 1
        self.kl_coef = 0.0 if config.has_kl_in_reward else config.kl_coef
        self.kl_estimator = config.kl_estimator
        self.kl_weighted = config.kl_weighted
        self.importance_correction = config.importance_correction
        self.importance_floor = config.importance_floor or 0.0
        self.importance_cap = math.inf if config.importance_cap is None else config.importance_cap
        self.masks_outside = config.importance_outside == "mask"

    def __call__(
        self,
        logprobs: torch.Tensor,
        batch: Mapping[str, Any],
        global_num_tokens: torch.Tensor,
        global_num_samples: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss and metrics of one micro-batch. See `LossFunction` for the arguments.

        Raises:
            ValueError: the batch lacks a key that the configuration needs, or a tensor has the wrong shape.
        """
        tokens = self._tokens(logprobs, batch)
        num_tokens = torch.clamp(global_num_tokens.to(logprobs.device), min=1)
        num_samples = torch.clamp(global_num_samples.to(logprobs.device), min=1)

        def aggregate(values: torch.Tensor) -> torch.Tensor:
            if self.aggregation == "token":
                return (values * tokens.mask).sum() / num_tokens
            if self.aggregation == "constant":
                return (values * tokens.mask).sum() / (self.constant_length * num_samples)
            means = (values * tokens.mask).sum(dim=1) / tokens.mask.sum(dim=1).clamp(min=1)
            return means.sum() / num_samples

        log_support = _log_support(batch, logprobs, tokens.mask)
        losses, token_metrics = self._surrogate(tokens)
        ratio = tokens.log_ratio.detach().exp()
        extremes = {"ratio_max": _maximum(ratio, tokens.mask), "ratio_min": -_maximum(-ratio, tokens.mask)}
        if self.importance_correction != "none":
            needed_by = f"loss.importance_correction={self.importance_correction}"
            generation = _field(batch, "generation_logprobs", needed_by, logprobs.shape, logprobs)[:, 1:]
            weights, importance_metrics, raw = self._importance(tokens, generation, log_support)
            losses = losses * weights
            token_metrics |= importance_metrics
            extremes["importance_weight_max"] = _maximum(raw, tokens.mask)
        loss = aggregate(losses)
        metrics = {"policy_loss": loss.detach()}
        if self.kl_coef > 0 or "reference_policy_logprobs" in batch:
            reference = _field(batch, "reference_policy_logprobs", "loss.kl_coef > 0", logprobs.shape, logprobs)[:, 1:]
            estimates = self._kl(tokens, reference)
            kl = aggregate(estimates if log_support is None else estimates * log_support.exp())
            metrics["kl"] = kl.detach()
            if self.kl_coef > 0:
                loss = loss + self.kl_coef * kl
        for name, values in token_metrics.items():
            metrics[name] = (values * tokens.mask).sum() / num_tokens
        return loss, metrics | extremes

    def _tokens(self, logprobs: torch.Tensor, batch: Mapping[str, Any]) -> _Tokens:
        if logprobs.ndim != 2:
            raise ValueError(f"logprobs must have the shape [b, T], got {list(logprobs.shape)}")
        shape, rows = logprobs.shape, logprobs.shape[:1]
        token_mask = _field(batch, "token_mask", "the loss", shape, logprobs)[:, 1:]
        sample_mask = _field(batch, "sample_mask", "the loss", rows, logprobs)
        mask = token_mask * sample_mask[:, None]
        # Without `prev_logprobs` this is the first update on the batch: pi_prev is the current policy.
        previous = logprobs.detach()[:, 1:]
        if "prev_logprobs" in batch:
            previous = _field(batch, "prev_logprobs", "the loss", shape, logprobs)[:, 1:]
        per_token = "advantages" in batch and batch["advantages"].ndim == 2
        advantages = _field(batch, "advantages", "the loss", shape if per_token else rows, logprobs)
        # Masked positions (padding may hold -inf) must reach neither the value nor the gradient.
        current = torch.where(mask > 0, logprobs[:, 1:], 0.0)
        previous = torch.where(mask > 0, previous, 0.0)
        # The same holds for the advantages of a masked sample or token.
        if per_token:
            advantages = torch.where(mask > 0, advantages[:, 1:], 0.0)
        else:
            advantages = torch.where(sample_mask > 0, advantages, 0.0)[:, None]
        return _Tokens(mask, current, previous, _clamped(current - previous), advantages)

    def _surrogate(self, tokens: _Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the negative surrogate [b, T-1] and its metrics per token."""
        metrics = {
            "ratio_mean": tokens.log_ratio.detach().exp(),
            "approx_kl": _k3(tokens.log_ratio.detach()),
            "entropy_estimate": -tokens.logprobs.detach(),
        }
        if self.objective == "reinforce":
            return -tokens.advantages * tokens.logprobs, metrics
        log_ratio = tokens.log_ratio
        if self.objective == "gspo":
            means = (log_ratio * tokens.mask).sum(dim=1, keepdim=True) / tokens.mask.sum(dim=1, keepdim=True).clamp(
                min=1
            )
            log_ratio = means.expand_as(log_ratio)
        ratio = log_ratio.exp()
        clipped, detached = ratio.clamp(self.clip_low, self.clip_high), ratio.detach()
        is_low, is_high = detached < self.clip_low, detached > self.clip_high
        if self.objective == "cispo":
            metrics |= {"clip_fraction_low": is_low, "clip_fraction_high": is_high}
            return -clipped.detach() * tokens.advantages * tokens.logprobs, metrics
        is_negative = tokens.advantages < 0
        metrics |= {"clip_fraction_low": is_low & is_negative, "clip_fraction_high": is_high & (tokens.advantages > 0)}
        losses = -torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)
        if self.dual_clip is not None:
            losses = torch.where(is_negative, torch.minimum(losses, -self.dual_clip * tokens.advantages), losses)
            metrics["clip_fraction_dual"] = (detached > self.dual_clip) & is_negative
        return losses, metrics

    def _kl(self, tokens: _Tokens, reference: torch.Tensor) -> torch.Tensor:
        """Return the KL estimate of each token, [b, T-1]."""
        d = _clamped(tokens.logprobs - torch.where(tokens.mask > 0, reference, 0.0))
        if self.kl_weighted:
            return kl_estimates(d, self.kl_estimator) * tokens.log_ratio.exp()
        if self.kl_estimator == "k1":
            return kl_estimates(d.detach(), "k1") * (1.0 + tokens.logprobs - tokens.logprobs.detach())
        return kl_estimates(d, self.kl_estimator)

    def _importance(
        self, tokens: _Tokens, generation: torch.Tensor, log_support: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Return bounded weights [b, T-1], metrics per token, and unbounded weights [b, T-1]; no gradient."""
        log_weight = tokens.previous - torch.where(tokens.mask > 0, generation, 0.0)
        generation_kl = _k3(_clamped(log_weight))
        if log_support is not None:
            log_weight = log_weight + log_support
        if self.importance_correction == "sequence":
            log_weight = log_weight.sum(dim=1, keepdim=True).expand_as(log_weight)
        raw = _clamped(log_weight).exp()
        outside = (raw < self.importance_floor) | (raw > self.importance_cap)
        bounded = raw.clamp(self.importance_floor, self.importance_cap)
        weights = torch.where(outside, 0.0, raw) if self.masks_outside else bounded
        metrics = {
            "importance_weight_mean": weights,
            "importance_truncated_fraction": outside,
            "generation_kl": generation_kl,
        }
        return weights, metrics, raw


class NLLLoss:
    """Computes the negative log-likelihood, averaged over all tokens in the loss of the optimizer batch.

    The average counts every token of the batch once, as `transformers.Trainer` does with `num_items_in_batch`: neither
    the number of workers nor the size of micro-batches, nor how tokens are distributed over samples, changes it.

    Example:
        >>> import torch
        >>> batch = {"token_mask": torch.tensor([[0.0, 1.0, 1.0]]), "sample_mask": torch.ones(1)}
        >>> loss, _ = NLLLoss()(torch.tensor([[0.0, -1.0, -3.0]]), batch, torch.tensor(2), torch.tensor(1))
        >>> loss.item()
        2.0
    """

    def __call__(
        self,
        logprobs: torch.Tensor,
        batch: Mapping[str, Any],
        global_num_tokens: torch.Tensor,
        global_num_samples: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss of one micro-batch. See `LossFunction` for the arguments.

        Raises:
            ValueError: the batch lacks a mask, or a mask has the wrong shape.
        """
        mask = _field(batch, "token_mask", "the loss", logprobs.shape, logprobs)[:, 1:]
        mask = mask * _field(batch, "sample_mask", "the loss", logprobs.shape[:1], logprobs)[:, None]
        # Masked positions (padding may hold -inf) must reach neither the value nor the gradient.
        losses = -torch.where(mask > 0, logprobs[:, 1:], 0.0)
        return (losses * mask).sum() / torch.clamp(global_num_tokens.to(logprobs.device), min=1), {}


def counted_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return [b, T] bool: whether a token is in the loss, by `token_mask` [b, T] and `sample_mask` [b]."""
    counted: torch.Tensor = batch["token_mask"] * batch["sample_mask"][:, None] > 0
    return counted


def kl_estimates(log_ratio: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimate KL(pi || pi_ref) of each token from samples of pi; see `ClippedPGLoss` for the formulas and bounds.

    Args:
        log_ratio: d = log pi - log pi_ref, any shape.
        estimator: "k1", "k2" or "k3".
    """
    d = _clamped(log_ratio)
    if estimator == "k1":
        return d.clamp(-_MAX_KL, _MAX_KL)
    if estimator == "k2":
        return (0.5 * d.square()).clamp(max=_MAX_KL)
    return _k3(-d)


def _clamped(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Return e^x - 1 - x, at most `_MAX_KL`; x is a clamped log-ratio."""
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=_MAX_KL)


def _log_support(batch: Mapping[str, Any], logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    """Return log Z [b, T-1], where Z is the probability under the policy of the tokens that top-p and top-k kept.

    It is 0 where the mask is 0. None if nothing was cut off.
    """
    if "sampling_logprobs" not in batch:
        return None
    generation, sampling = (
        _field(batch, key, "top-p or top-k", logprobs.shape, logprobs)[:, 1:]
        for key in ("generation_logprobs", "sampling_logprobs")
    )
    return torch.where(mask > 0, generation - sampling, 0.0)


def _field(batch: Mapping[str, Any], key: str, needed_by: str, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the batch on the device and in the dtype of `like`, after checking its shape."""
    if key not in batch:
        raise ValueError(f"{needed_by} needs {key!r} in the batch, which has only: {', '.join(sorted(batch))}")
    value: torch.Tensor = batch[key]
    if value.shape != shape:
        raise ValueError(f"{key!r} has the shape {list(value.shape)}, expected {list(shape)}")
    return value.detach().to(device=like.device, dtype=like.dtype)


def _maximum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the largest counted value, or -inf without counted values, the neutral element of a maximum."""
    counted = torch.where(mask > 0, values, -math.inf).flatten()
    return torch.cat([counted, counted.new_tensor([-math.inf])]).amax()
