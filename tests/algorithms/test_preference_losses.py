"""Losses over preference pairs against their formulas in float64, in value and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nemo_rl.algorithms.dpo_config import DPOConfig
from nemo_rl.algorithms.preference_losses import DPOLoss

PAIRS, WIDTH = 5, 9
LOSSES = [
    {"loss": "sigmoid", "beta": 0.1},
    {"loss": "sigmoid", "beta": 0.7, "label_smoothing": 0.2},
    {"loss": "ipo", "beta": 0.3},
]


def make_batch(seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return log-probabilities and pairs of answers of different lengths; the second pair is excluded."""
    draws = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(2 * PAIRS, WIDTH, generator=draws, dtype=torch.float64)
    mask = (torch.rand(2 * PAIRS, WIDTH, generator=draws) < 0.6).float()
    mask[:, -1] = 1.0
    sample_mask = torch.ones(2 * PAIRS)
    sample_mask[2:4] = 0.0
    reference = -10 * torch.rand(2 * PAIRS, generator=draws, dtype=torch.float64)
    margin = torch.rand(PAIRS, generator=draws).repeat_interleave(2)
    return logprobs, {
        "token_mask": mask,
        "sample_mask": sample_mask,
        "reference_logprobs": reference,
        "margin": margin,
    }


def pair_losses(logprobs: torch.Tensor, batch: dict[str, torch.Tensor], config: dict[str, Any]) -> list[torch.Tensor]:
    """Return the loss of each counted pair, written out from the papers' equations."""
    losses = []
    beta, smoothing = config["beta"], config.get("label_smoothing", 0.0)
    for pair in range(PAIRS):
        if batch["sample_mask"][2 * pair] == 0:
            continue
        ratios, lengths = [], []
        for row in (2 * pair, 2 * pair + 1):
            tokens = [t for t in range(1, WIDTH) if batch["token_mask"][row, t]]
            ratios.append(sum(logprobs[row, t] for t in tokens) - batch["reference_logprobs"][row])
            lengths.append(len(tokens))
        if config["loss"] == "ipo":
            losses.append((ratios[0] / lengths[0] - ratios[1] / lengths[1] - 1 / (2 * beta)) ** 2)
            continue
        h = beta * (ratios[0] - ratios[1])
        sigmoid = 1 / (1 + torch.exp(-h))
        losses.append(-(1 - smoothing) * sigmoid.log() - smoothing * (1 - sigmoid).log())
    return losses


@pytest.mark.parametrize("config", LOSSES)
def test_loss_and_gradient_equal_the_equation(config: dict[str, Any]) -> None:
    logprobs, batch = make_batch()
    expected_input, actual_input = (logprobs.clone().requires_grad_() for _ in range(2))
    losses = pair_losses(expected_input, batch, config)
    expected = torch.stack(losses).mean()
    expected.backward()
    loss, _ = DPOLoss(DPOConfig(**config))(actual_input, batch, torch.tensor(0), batch["sample_mask"].sum())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(actual_input.grad, expected_input.grad, atol=1e-12)
    assert actual_input.grad[2:4].abs().max() == 0.0


@pytest.mark.parametrize("config", LOSSES)
def test_parts_of_a_batch_add_up(config: dict[str, Any]) -> None:
    logprobs, batch = make_batch()
    loss_fn, count = DPOLoss(DPOConfig(**config)), batch["sample_mask"].sum()
    complete, expected = loss_fn(logprobs, batch, torch.tensor(0), count)
    total, sums = 0.0, dict.fromkeys(expected, 0.0)
    for rows in (slice(0, 4), slice(4, 10)):
        part = {key: value[rows] for key, value in batch.items()}
        loss, metrics = loss_fn(logprobs[rows], part, torch.tensor(0), count)
        total += loss.item()
        sums = {name: sums[name] + value.item() for name, value in metrics.items()}
    assert total == pytest.approx(complete.item())
    assert sums == pytest.approx({name: value.item() for name, value in expected.items()})


def test_metrics_are_means_over_pairs() -> None:
    logprobs, batch = make_batch()
    counted = batch["sample_mask"] > 0
    sums = (logprobs * batch["token_mask"])[:, 1:].sum(1)
    rewards = 0.5 * (sums - batch["reference_logprobs"])[counted].view(-1, 2)
    _, metrics = DPOLoss(DPOConfig(beta=0.5))(logprobs, batch, torch.tensor(0), batch["sample_mask"].sum())
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "chosen_reward": rewards[:, 0].mean().item(),
            "rejected_reward": rewards[:, 1].mean().item(),
            "reward_margin": (rewards[:, 0] - rewards[:, 1]).mean().item(),
            "reward_accuracy": (rewards[:, 0] > rewards[:, 1]).double().mean().item(),
            "chosen_logprob": sums[counted][0::2].mean().item(),
            "rejected_logprob": sums[counted][1::2].mean().item(),
        }
    )


def test_masked_positions_reach_neither_value_nor_gradient() -> None:
    logprobs, batch = make_batch()
    damaged = torch.where(batch["token_mask"] > 0, logprobs, -math.inf)
    damaged[2:4] = math.nan
    values = damaged.requires_grad_()
    loss, metrics = DPOLoss(DPOConfig())(values, batch, torch.tensor(0), batch["sample_mask"].sum())
    loss.backward()
    expected, _ = DPOLoss(DPOConfig())(logprobs, batch, torch.tensor(0), batch["sample_mask"].sum())
    assert loss.item() == expected.item()
    assert all(math.isfinite(value) for value in metrics.values())
    inside = (batch["token_mask"] > 0) & (batch["sample_mask"][:, None] > 0)
    assert values.grad[~inside].abs().nan_to_num(1.0).max() == 0.0


def test_extreme_margins_have_finite_losses_and_gradients() -> None:
    _, batch = make_batch()
    for scale in (-1e4, 1e4):
        logprobs = torch.zeros(2 * PAIRS, WIDTH)
        logprobs[0::2] = scale
        logprobs.requires_grad_()
        loss, _ = DPOLoss(DPOConfig(label_smoothing=0.1))(logprobs, batch, torch.tensor(0), batch["sample_mask"].sum())
        loss.backward()
        assert math.isfinite(loss.item())
        assert torch.isfinite(logprobs.grad).all()


def test_odd_number_of_rows_is_refused() -> None:
    logprobs, batch = make_batch()
    part = {key: value[:3] for key, value in batch.items()}
    with pytest.raises(ValueError, match="a loss over pairs needs an even number of rows, got 3"):
        DPOLoss(DPOConfig())(logprobs[:3], part, torch.tensor(0), torch.tensor(3))
