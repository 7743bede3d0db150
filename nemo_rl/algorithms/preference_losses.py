"""Losses over preference pairs. `nemo_rl.models.policy.interfaces.LossFunction` defines the interface.

Rows 2i and 2i + 1 of a micro-batch are the chosen and the rejected answer of a pair. All means are over the pairs of
the optimizer batch, so neither the number of workers nor the size of micro-batches changes a loss.

This module imports only torch and its neighbour, because a loss is sent to policy workers in any venv.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid

from nemo_rl.algorithms.loss_functions import counted_tokens

if TYPE_CHECKING:
    from nemo_rl.algorithms.dpo_config import DPOConfig
    from nemo_rl.algorithms.reward_model_config import RewardModelConfig

_ROWS_PER_PAIR = 2


class DPOLoss:
    """Computes the loss of direct preference optimization (DPO), or of its variants IPO and cDPO.

    With h = log(pi / pi_ref)(chosen) - log(pi / pi_ref)(rejected), where the log-probability of an answer is the sum
    over its tokens in the loss:

        "sigmoid"  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
                   e = 0: Rafailov et al. (2023), "Direct Preference Optimization", arXiv:2305.18290, equation 7.
                   e > 0 (`label_smoothing`): a share e of the pairs is labeled the wrong way round. Mitchell (2023),
                   "A note on DPO with noisy preferences & relationship to IPO" ("conservative DPO").
        "ipo"      (h' - 1 / (2 beta))^2, Azar et al. (2023), "A General Theoretical Paradigm to Understand Learning
                   from Human Preferences", arXiv:2310.12036, equation 17, whose tau is beta. h' is h with the mean over
                   the tokens of each answer instead of the sum, as in TRL, whose authors report it to be what the
                   paper's experiments used.

    Example:
        >>> import torch
        >>> from nemo_rl.algorithms.dpo_config import DPOConfig
        >>> batch = {
        ...     "token_mask": torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        ...     "sample_mask": torch.ones(2),
        ...     "reference_logprobs": torch.tensor([-1.0, -1.0]),
        ... }
        >>> logprobs = torch.tensor([[0.0, -1.0], [0.0, -1.0]])
        >>> loss, _ = DPOLoss(DPOConfig())(logprobs, batch, torch.tensor(2), torch.tensor(2))
        >>> round(loss.item(), 4)  # the policy is the reference: log 2
        0.6931

    Metrics (means over pairs):
        chosen_reward, rejected_reward: beta log(pi / pi_ref) of the answers, also for IPO.
        reward_margin, reward_accuracy: their difference, and how often it is positive.
        chosen_logprob, rejected_logprob: log pi of the answers.
    """

    rows_per_group = _ROWS_PER_PAIR

    def __init__(self, config: DPOConfig) -> None:
        # Plain values, so that unpickling a loss does not import the configuration's packages.
        self.objective = config.loss
        self.beta = config.beta
        self.label_smoothing = config.label_smoothing

    def __call__(
        self,
        logprobs: torch.Tensor,
        batch: Mapping[str, Any],
        global_num_tokens: torch.Tensor,
        global_num_samples: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss of one micro-batch. See `LossFunction` for the arguments.

        The batch has `reference_logprobs` [b]: log pi_ref of the answers (see `answer_logprobs`).

        Raises:
            ValueError: the rows are not pairs.
        """
        sums = answer_logprobs(logprobs, batch)
        ratios = sums - batch["reference_logprobs"].to(sums)
        if self.objective == "ipo":
            means = ratios / batch["token_mask"][:, 1:].sum(dim=1).clamp(min=1)
            chosen, rejected = _answers(means)
            losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        else:
            chosen, rejected = _answers(self.beta * ratios)
            losses = -(1 - self.label_smoothing) * logsigmoid(chosen - rejected)
            losses = losses - self.label_smoothing * logsigmoid(rejected - chosen)
        mean = _PairMean(batch, global_num_samples)
        chosen_logprobs, rejected_logprobs = _answers(sums.detach())
        metrics = _reward_metrics(self.beta * ratios.detach(), mean) | {
            "chosen_logprob": mean(chosen_logprobs),
            "rejected_logprob": mean(rejected_logprobs),
        }
        return mean(losses).to(logprobs.dtype), metrics


class BradleyTerryLoss:
    """Computes the loss of a reward model r: -log sigmoid(r(chosen) - r(rejected) - margin).

    The probability that an answer is better is that of Bradley and Terry (1952). Ouyang et al. (2022), "Training
    language models to follow instructions with human feedback", arXiv:2203.02155, equation 1, with one pair per prompt.
    The margin of a pair, which is 0 if the data have none, is that of Touvron et al. (2023), "Llama 2",
    arXiv:2307.09288, equation 2. `centering` c adds c (r(chosen) + r(rejected))^2, so that rewards are around 0:
    Eisenstein et al. (2023), "Helping or Herding?", arXiv:2312.09244, equation 2.

    Example:
        >>> import torch
        >>> from nemo_rl.algorithms.reward_model_config import RewardModelConfig
        >>> batch = {"margin": torch.zeros(2), "sample_mask": torch.ones(2)}
        >>> scores = torch.tensor([1.0, -1.0])
        >>> loss, metrics = BradleyTerryLoss(RewardModelConfig())(scores, batch, torch.tensor(0), torch.tensor(2))
        >>> round(loss.item(), 4), metrics["reward_accuracy"].item()
        (0.1269, 1.0)

    Metrics (means over pairs): those of `DPOLoss`, without log-probabilities.
    """

    rows_per_group = _ROWS_PER_PAIR

    def __init__(self, config: RewardModelConfig) -> None:
        self.centering = config.centering

    def __call__(
        self,
        scores: torch.Tensor,
        batch: Mapping[str, Any],
        global_num_tokens: torch.Tensor,
        global_num_samples: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss of one micro-batch from the rewards [b] of its rows. The batch has `margin` [b].

        Raises:
            ValueError: the rows are not pairs.
        """
        rewards = scores.double()
        chosen, rejected = _answers(rewards)
        margin, _ = _answers(batch["margin"].to(rewards))
        losses = -logsigmoid(chosen - rejected - margin) + self.centering * (chosen + rejected).square()
        mean = _PairMean(batch, global_num_samples)
        return mean(losses).to(scores.dtype), _reward_metrics(rewards.detach(), mean)


def answer_logprobs(logprobs: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the log-probability of each answer, [b] float64: the sum over its tokens in the loss.

    Sums of hundreds of float32 values, whose small differences matter here, would be inexact.

    Args:
        logprobs: [b, T] log-probabilities of the tokens.
        batch: `token_mask` [b, T], and `sample_mask` [b]; a row where it is 0 has the value 0.
    """
    mask = counted_tokens(batch)[:, 1:].to(logprobs.device)
    # Masked positions (padding may hold -inf) must reach neither the value nor the gradient.
    return torch.where(mask, logprobs[:, 1:], 0.0).sum(dim=1, dtype=torch.float64)


class _PairMean:
    """Sums values of pairs, without pairs whose `sample_mask` is 0, and divides by the global number of pairs."""

    def __init__(self, batch: Mapping[str, Any], global_num_samples: torch.Tensor) -> None:
        self._mask, _ = _answers(batch["sample_mask"])
        self._num_pairs = global_num_samples / _ROWS_PER_PAIR

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        counted = torch.where(self._mask.to(values.device) > 0, values, 0.0)
        return counted.sum() / self._num_pairs.to(values.device).clamp(min=1)


def _answers(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the chosen and of the rejected answers."""
    if len(rows) % _ROWS_PER_PAIR:
        raise ValueError(f"a loss over pairs needs an even number of rows, got {len(rows)}")
    return rows[0::2], rows[1::2]


def _reward_metrics(rewards: torch.Tensor, mean: _PairMean) -> dict[str, torch.Tensor]:
    chosen, rejected = _answers(rewards)
    return {
        "chosen_reward": mean(chosen),
        "rejected_reward": mean(rejected),
        "reward_margin": mean(chosen - rejected),
        "reward_accuracy": mean((chosen > rejected).double()),
    }
