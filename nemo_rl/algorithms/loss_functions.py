"""Losses over one micro-batch. See `nemo_rl.models.policy.interfaces.LossFunction` for what a loss has to be.

Only torch is imported here: a loss travels to every policy worker, whatever its venv.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nemo_rl.algorithms.config import LossConfig


@dataclass(frozen=True)
class _Tokens:
    """A micro-batch without position 0, which no log-probability belongs to; all [b, T-1].

    Attributes:
        mask: 1 where a token counts, else 0; the other tensors are 0 there.
        logprobs: log pi, with gradient.
        previous: log pi_prev.
        log_ratio: log pi / pi_prev, with gradient.
        advantages: [b, 1].
    """

    mask: torch.Tensor
    logprobs: torch.Tensor
    previous: torch.Tensor
    log_ratio: torch.Tensor
    advantages: torch.Tensor


class ClippedPGLoss:
    """The clipped policy-gradient surrogate of PPO, GRPO and DAPO, with a KL term and importance correction.

    Per token t of sample i, with pi the policy being trained, pi_prev the policy before the step (`prev_logprobs`;
    where the batch has none it is pi itself, without gradient),
    pi_gen the generator (`generation_logprobs`), A_i the advantage, and r = pi / pi_prev:

        surrogate   min(r A, clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A)
                    PPO: Schulman et al. (2017), arXiv:1707.06347, equation 7. Two clip ratios ("clip-higher"): DAPO,
                    Yu et al. (2025), arXiv:2503.14476, equation 10.
        dual clip   max(surrogate, dual_clip * A) where A < 0: Ye et al. (2020), arXiv:1912.09729, section "Dual-clip
                    PPO". It bounds the loss of a bad token that has become much more likely.
        weight      w = min(pi_prev / pi_gen, importance_cap), a constant for the gradient: the truncated importance
                    sampling of Ionides (2008), "Truncated Importance Sampling", as Yao et al. (2025), "Your Efficient
                    RL Framework Secretly Brings You Off-Policy RL Training", use it for two engines that disagree
                    about one policy. With `importance_correction="sequence"`, pi_prev and pi_gen are probabilities of
                    the whole completion (the product over its counted tokens), so that all its tokens share one w.
        loss        aggregate(-w * surrogate) + kl_coef * aggregate(KL term)

    aggregate, with the *global* counts, so that losses of micro-batches and ranks add up:

        "token"     sum over all tokens / global_num_tokens: DAPO, equation 12
        "sequence"  sum over samples of the mean over the sample's tokens / global_num_samples: GRPO, Shao et al.
                    (2024), arXiv:2402.03300, equation 3. A sample with no counted token adds 0.

    KL term, with d = log pi - log pi_ref: estimators of KL(pi || pi_ref) from samples of pi, Schulman (2020),
    "Approximating KL Divergence". A good estimator of a value is not always a good loss, because the samples depend
    on pi too (Tang & Munos (2025), arXiv:2506.09477):

        "k1"  d            Unbiased, high variance, may be negative. Differentiated as it stands its gradient is 0 on
                           average, which is why here its gradient is d * grad(log pi): the score-function gradient,
                           the same as putting -kl_coef * d into the reward. Unbiased for grad KL(pi || pi_ref).
        "k2"  d^2 / 2      Biased as a value; differentiated as it stands: d * grad(log pi), unbiased as above.
        "k3"  e^-d - 1 + d Unbiased, low variance, never negative; GRPO's choice (equation 4). Differentiated as it
                           stands: (1 - e^-d) * grad(log pi), which is grad KL(pi_ref || pi) on average. It is *biased*
                           as a loss for KL(pi || pi_ref): equal to first order in d, weaker where pi puts mass that
                           pi_ref does not, unbounded where pi_ref does and pi does not.

    "Unbiased" is per token and for samples of pi itself: the KL term carries neither r nor w.

    Metrics (token means over `global_num_tokens` unless said otherwise; they add up over micro-batches and ranks):
        policy_loss, kl: the two aggregates, so that loss = policy_loss + kl_coef * kl. `kl` is there whenever
            the batch has `reference_policy_logprobs`.
        ratio_mean; ratio_max, ratio_min: over tokens; -inf and inf for a micro-batch without any.
        clip_fraction_low, clip_fraction_high, clip_fraction_dual: tokens whose gradient that bound has cut off.
        approx_kl: k3 for KL(pi_prev || pi): how far this update has moved.
        entropy_estimate: -log pi of the tokens; unbiased for the entropy while pi is what sampled them.
        importance_weight_mean (after truncation), importance_truncated_fraction, importance_weight_max (before),
            generation_kl (k3 for KL(pi_gen || pi_prev)): only with importance correction.
    """

    def __init__(self, config: LossConfig) -> None:
        # Plain values: unpickling a loss must not need the configuration's packages.
        self.clip_low = 1.0 - config.clip_ratio_low
        self.clip_high = 1.0 + config.clip_ratio_high
        self.dual_clip = config.dual_clip
        self.sequence_level = config.aggregation == "sequence"
        self.kl_coef = config.kl_coef
        self.kl_estimator = config.kl_estimator
        self.importance_correction = config.importance_correction
        self.importance_cap = math.inf if config.importance_cap is None else config.importance_cap

    def __call__(
        self,
        logprobs: torch.Tensor,
        batch: Mapping[str, Any],
        global_num_tokens: torch.Tensor,
        global_num_samples: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of one micro-batch, as `LossFunction` says.

        Raises:
            ValueError: the batch lacks a key that the configuration needs, or a tensor has the wrong shape.
        """
        tokens = self._tokens(logprobs, batch)
        num_tokens = torch.clamp(global_num_tokens.to(logprobs.device), min=1)
        num_samples = torch.clamp(global_num_samples.to(logprobs.device), min=1)

        def aggregate(values: torch.Tensor) -> torch.Tensor:
            if not self.sequence_level:
                return (values * tokens.mask).sum() / num_tokens
            means = (values * tokens.mask).sum(dim=1) / tokens.mask.sum(dim=1).clamp(min=1)
            return means.sum() / num_samples

        losses, token_metrics = self._surrogate(tokens)
        ratio = tokens.log_ratio.detach().exp()
        extremes = {"ratio_max": _maximum(ratio, tokens.mask), "ratio_min": -_maximum(-ratio, tokens.mask)}
        if self.importance_correction != "none":
            needed_by = f"loss.importance_correction={self.importance_correction}"
            generation = _field(batch, "generation_logprobs", needed_by, logprobs.shape, logprobs)[:, 1:]
            weights, importance_metrics, raw = self._importance(tokens, generation)
            losses = losses * weights
            token_metrics |= importance_metrics
            extremes["importance_weight_max"] = _maximum(raw, tokens.mask)
        loss = aggregate(losses)
        metrics = {"policy_loss": loss.detach()}
        if self.kl_coef > 0 or "reference_policy_logprobs" in batch:
            reference = _field(batch, "reference_policy_logprobs", "loss.kl_coef > 0", logprobs.shape, logprobs)[:, 1:]
            kl = aggregate(self._kl(tokens, reference))
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
        # Without `prev_logprobs` this is the first update on the batch: the policy before the step is this very one.
        previous = logprobs.detach()[:, 1:]
        if "prev_logprobs" in batch:
            previous = _field(batch, "prev_logprobs", "the loss", shape, logprobs)[:, 1:]
        advantages = _field(batch, "advantages", "the loss", rows, logprobs)
        # Whatever stands at a position that does not count (padding may hold -inf) must not reach value or gradient.
        current = torch.where(mask > 0, logprobs[:, 1:], 0.0)
        previous = torch.where(mask > 0, previous, 0.0)
        # Likewise the advantage of a sample that is masked as a whole.
        advantages = torch.where(sample_mask > 0, advantages, 0.0)[:, None]
        return _Tokens(mask, current, previous, current - previous, advantages)

    def _surrogate(self, tokens: _Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[b, T-1] minus the clipped surrogate of each token, and its metrics per token."""
        ratio = tokens.log_ratio.exp()
        clipped = ratio.clamp(self.clip_low, self.clip_high)
        losses = -torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)
        detached, bad = ratio.detach(), tokens.advantages < 0
        metrics = {
            "ratio_mean": detached,
            "clip_fraction_low": (detached < self.clip_low) & bad,
            "clip_fraction_high": (detached > self.clip_high) & (tokens.advantages > 0),
            "approx_kl": torch.expm1(tokens.log_ratio.detach()) - tokens.log_ratio.detach(),
            "entropy_estimate": -tokens.logprobs.detach(),
        }
        if self.dual_clip is not None:
            losses = torch.where(bad, torch.minimum(losses, -self.dual_clip * tokens.advantages), losses)
            metrics["clip_fraction_dual"] = (detached > self.dual_clip) & bad
        return losses, metrics

    def _kl(self, tokens: _Tokens, reference: torch.Tensor) -> torch.Tensor:
        """[b, T-1] the KL estimate of each token."""
        d = tokens.logprobs - torch.where(tokens.mask > 0, reference, 0.0)
        if self.kl_estimator == "k1":
            return d.detach() * (1.0 + tokens.logprobs - tokens.logprobs.detach())
        if self.kl_estimator == "k2":
            return 0.5 * d.square()
        return torch.expm1(-d) + d

    def _importance(
        self, tokens: _Tokens, generation: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """[b, T-1] truncated weights, metrics per token, and [b, T-1] weights before truncation; no gradient."""
        log_weight = tokens.previous - torch.where(tokens.mask > 0, generation, 0.0)
        generation_kl = torch.expm1(log_weight) - log_weight
        if self.importance_correction == "sequence":
            log_weight = log_weight.sum(dim=1, keepdim=True).expand_as(log_weight)
        raw = log_weight.exp()
        weights = raw.clamp(max=self.importance_cap)
        metrics = {
            "importance_weight_mean": weights,
            "importance_truncated_fraction": raw > self.importance_cap,
            "generation_kl": generation_kl,
        }
        return weights, metrics, raw


def _field(batch: Mapping[str, Any], key: str, needed_by: str, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the batch, on the device and in the dtype of the log-probabilities; its shape is checked."""
    if key not in batch:
        raise ValueError(f"{needed_by} needs {key!r} in the batch, which has only: {', '.join(sorted(batch))}")
    value: torch.Tensor = batch[key]
    if value.shape != shape:
        raise ValueError(f"{key!r} has the shape {list(value.shape)}, expected {list(shape)}")
    return value.detach().to(device=like.device, dtype=like.dtype)


def _maximum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The largest counted value; -inf where none counts, so that a maximum over micro-batches is right."""
    counted = torch.where(mask > 0, values, -math.inf).flatten()
    return torch.cat([counted, counted.new_tensor([-math.inf])]).amax()
