"""Compares the objectives, masks and KL placements of the papers with formulas that are written out per sample.

The references use autograd in float64 and loops over samples, and share no code with the loss.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_loss_functions import Batch, apply, counts, make_batch

from nemo_rl.algorithms.advantages import compute_advantages, overlong_penalties
from nemo_rl.algorithms.config import AdvantageConfig, GRPOConfig, LossConfig, MasterConfig
from nemo_rl.algorithms.loss_functions import ClippedPGLoss, kl_estimates
from nemo_rl.algorithms.loss_recipes import LOSS_RECIPES
from nemo_rl.errors import ConfigError
from nemo_rl.utils.config import dump_yaml, load_config

NO_CORRECTION = {"importance_correction": "none"}


def samples(batch: Batch) -> list[tuple[int, torch.Tensor]]:
    """Return each counted sample with the positions of its counted tokens."""
    rows = range(len(batch["sample_mask"]))
    positions = [
        torch.tensor([t for t in range(1, batch["token_mask"].shape[1]) if batch["token_mask"][i, t]]) for i in rows
    ]
    return [(i, positions[i].long()) for i in rows if batch["sample_mask"][i]]


def gradient_of(value: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(value, logprobs)
    return gradient


def assert_equal_to(config: LossConfig, logprobs: torch.Tensor, batch: Batch, expected: torch.Tensor) -> None:
    """Compare value and gradient. `expected` was computed from `logprobs`."""
    wanted = gradient_of(expected, logprobs)
    loss, _ = apply(config, logprobs, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient_of(loss, logprobs), wanted, rtol=1e-6, atol=1e-9)


@pytest.fixture(params=range(4))
def data(request: pytest.FixtureRequest) -> tuple[torch.Tensor, Batch]:
    logprobs, batch = make_batch(5, 7, request.param)
    return logprobs.requires_grad_(), batch


def test_gspo(data: tuple[torch.Tensor, Batch]) -> None:
    """Equation 5: mean over sequences of min(s A, clip(s) A) with s = (pi / pi_prev)^(1 / |y|)."""
    logprobs, batch = data
    total = logprobs.new_zeros(())
    for i, at in samples(batch):
        if len(at):
            s = ((logprobs[i, at] - batch["prev_logprobs"][i, at]).sum() / len(at)).exp()
            total = total + torch.minimum(s * batch["advantages"][i], s.clamp(0.9, 1.1) * batch["advantages"][i])
    config = LossConfig(
        objective="gspo", clip_ratio_low=0.1, clip_ratio_high=0.1, aggregation="sequence", **NO_CORRECTION
    )
    assert_equal_to(config, logprobs, batch, -total / batch["sample_mask"].sum())


def test_cispo(data: tuple[torch.Tensor, Batch]) -> None:
    """Equation 4: the clipped ratio is a constant, so that clipped tokens have a gradient, too."""
    logprobs, batch = data
    total = logprobs.new_zeros(())
    for i, at in samples(batch):
        weights = (logprobs[i, at] - batch["prev_logprobs"][i, at]).exp().clamp(max=1.2).detach()
        total = total + (weights * batch["advantages"][i] * logprobs[i, at]).sum()
    config = LossConfig(objective="cispo", clip_ratio_low=1.0, clip_ratio_high=0.2, **NO_CORRECTION)
    assert_equal_to(config, logprobs, batch, -total / counts(batch)[0])


@pytest.mark.parametrize("constant", [1, 16])
def test_reinforce_with_a_constant_divisor(data: tuple[torch.Tensor, Batch], constant: int) -> None:
    logprobs, batch = data
    total = sum((batch["advantages"][i] * logprobs[i, at].sum() for i, at in samples(batch)), logprobs.new_zeros(()))
    config = LossConfig(objective="reinforce", aggregation="constant", constant_length=constant, **NO_CORRECTION)
    assert_equal_to(config, logprobs, batch, -total / (constant * batch["sample_mask"].sum()))


def test_dr_grpo_divides_by_a_constant_length(data: tuple[torch.Tensor, Batch]) -> None:
    logprobs, batch = data
    total = logprobs.new_zeros(())
    for i, at in samples(batch):
        ratio, advantage = (logprobs[i, at] - batch["prev_logprobs"][i, at]).exp(), batch["advantages"][i]
        total = total + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    config = LossConfig(aggregation="constant", constant_length=10, **NO_CORRECTION)
    assert_equal_to(config, logprobs, batch, -total / (10 * batch["sample_mask"].sum()))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("outside", ["truncate", "mask"])
def test_importance_weights_with_both_bounds(data: tuple[torch.Tensor, Batch], level: str, outside: str) -> None:
    """IcePop is the mask at the level of tokens; the truncation with both bounds is what is left of it."""
    logprobs, batch = data
    low, high, total = 0.8, 1.25, logprobs.new_zeros(())
    for i, at in samples(batch):
        difference = batch["prev_logprobs"][i, at] - batch["generation_logprobs"][i, at]
        raw = difference.sum().exp().expand(len(at)) if level == "sequence" else difference.exp()
        weights = raw.clamp(low, high) if outside == "truncate" else raw * ((raw >= low) & (raw <= high))
        total = total + (weights * batch["advantages"][i] * logprobs[i, at]).sum()
    config = LossConfig(
        objective="reinforce",
        importance_correction=level,
        importance_floor=low,
        importance_cap=high,
        importance_outside=outside,
    )
    assert_equal_to(config, logprobs, batch, -total / counts(batch)[0])


def test_advantages_per_token(data: tuple[torch.Tensor, Batch]) -> None:
    logprobs, batch = data
    batch["advantages"] = torch.randn(logprobs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    total = logprobs.new_zeros(())
    for i, at in samples(batch):
        ratio, advantages = (logprobs[i, at] - batch["prev_logprobs"][i, at]).exp(), batch["advantages"][i, at]
        total = total + torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
    assert_equal_to(LossConfig(**NO_CORRECTION), logprobs, batch, -total / counts(batch)[0])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_weighted_kl(data: tuple[torch.Tensor, Batch], estimator: str) -> None:
    logprobs, batch = data
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    total = logprobs.new_zeros(())
    for i, at in samples(batch):
        d = logprobs[i, at] - batch["reference_policy_logprobs"][i, at]
        value = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
        total = total + ((logprobs[i, at] - batch["prev_logprobs"][i, at]).exp() * value).sum()
    config = LossConfig(kl_coef=0.5, kl_estimator=estimator, kl_weighted=True, **NO_CORRECTION)
    assert_equal_to(config, logprobs, batch, 0.5 * total / counts(batch)[0])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expected_gradient_of_the_weighted_kl_is_exact(estimator: str) -> None:
    """Sum over all tokens of pi_prev(x) grad(r kl(x)): grad KL(pi || pi_ref), although the samples are from pi_prev."""
    generator = torch.Generator().manual_seed(0)
    logits, previous, reference = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    log_pi, log_ref = logits.log_softmax(0), reference.log_softmax(0)
    exact = gradient_of((log_pi.exp() * (log_pi - log_ref)).sum(), logits)
    log_prev = previous.log_softmax(0)
    total = logits.new_zeros(())
    for token in range(6):
        batch = {
            "token_mask": torch.tensor([[0.0, 1.0]]),
            "sample_mask": torch.ones(1),
            "advantages": torch.zeros(1),
            "prev_logprobs": torch.stack([torch.zeros(()), log_prev[token]])[None],
            "reference_policy_logprobs": torch.stack([torch.zeros(()), log_ref[token]])[None],
        }
        logprobs = torch.stack([torch.zeros((), dtype=torch.float64), logits.log_softmax(0)[token]])[None]
        config = LossConfig(kl_coef=1.0, kl_estimator=estimator, kl_weighted=True, **NO_CORRECTION)
        total = total + log_prev[token].exp() * apply(config, logprobs, batch)[0]
    torch.testing.assert_close(gradient_of(total, logits), exact)


def test_kl_in_the_reward_leaves_the_loss() -> None:
    logprobs, batch = make_batch(4, 6, 1)
    outside = apply(LossConfig(kl_coef=0.7, kl_placement="reward"), logprobs, batch)
    assert outside[0] == apply(LossConfig(kl_coef=0.0), logprobs, batch)[0]
    assert outside[1]["kl"] == apply(LossConfig(kl_coef=0.7), logprobs, batch)[1]["kl"]


# --- advantages -------------------------------------------------------------------------------------------------------


def test_batch_normalization() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 5.0, 9.0], dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 1, 0])
    config = AdvantageConfig(baseline="none", normalize_over="batch")
    advantages = compute_advantages(rewards, torch.tensor([0, 0, 1, 1, 1]), config, mask)
    counted = rewards[:4]
    torch.testing.assert_close(advantages[:4], (counted - counted.mean()) / (counted.std() + 1e-6))
    assert advantages[4] == 0


def test_group_baseline_then_batch_normalization() -> None:
    rewards = torch.tensor([1.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    config = AdvantageConfig(baseline="mean", normalize_over="batch")
    centered = torch.tensor([0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(compute_advantages(rewards, 2, config), centered / (centered.std() + 1e-6))


def test_penalties_to_go() -> None:
    """Equation 8 of REINFORCE++: the reward minus the penalties from the token on, normalized over all tokens."""
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    penalties = torch.tensor([[9.0, 0.1, 0.2, 0.4], [9.0, 0.3, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])
    raw = torch.tensor([0.3, 0.4, 0.6, -0.3], dtype=torch.float64)
    plain = AdvantageConfig(baseline="none", normalize_std=False)
    result = compute_advantages(rewards, 1, plain, token_penalties=penalties, token_mask=mask)
    torch.testing.assert_close(result[mask > 0], raw)
    assert not result[mask == 0].any()
    whitened = AdvantageConfig(baseline="none", normalize_over="batch")
    result = compute_advantages(rewards, 1, whitened, token_penalties=penalties, token_mask=mask)
    torch.testing.assert_close(result[mask > 0], (raw - raw.mean()) / (raw.std() + 1e-6))


def test_overlong_penalties_grow_linearly_to_the_limit() -> None:
    lengths = torch.tensor([1, 80, 85, 90, 100])
    expected = torch.tensor([0.0, 0.0, -0.5, -1.0, -2.0])
    torch.testing.assert_close(overlong_penalties(lengths, 100, 20, 2.0), expected)


def test_kl_estimates_by_hand() -> None:
    d = torch.tensor([0.5, -1.0], dtype=torch.float64)
    torch.testing.assert_close(kl_estimates(d, "k1"), d)
    torch.testing.assert_close(kl_estimates(d, "k2"), torch.tensor([0.125, 0.5], dtype=torch.float64))
    torch.testing.assert_close(kl_estimates(d, "k3"), torch.exp(-d) - 1 + d)


# --- recipes ----------------------------------------------------------------------------------------------------------


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("name", LOSS_RECIPES)
def test_recipe_sets_its_keys(name: str, tmp_path: Any) -> None:
    config = load_config(MasterConfig, None, [f"loss={name}"])
    for key, value in LOSS_RECIPES[name].items():
        assert (value_at(config, key) is not None) if value == {} else value_at(config, key) == value
    assert config == load_config(MasterConfig, None, [f"loss.recipe={name}"])
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(config))
    assert load_config(MasterConfig, file) == config
    ClippedPGLoss(config.resolved_loss)


def test_given_keys_override_the_recipe(tmp_path: Any) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "loss: {recipe: dapo, clip_ratio_high: 0.5}\ngrpo: {dynamic_sampling: {max_generation_batches: 3}}\n"
    )
    config = load_config(MasterConfig, file, ["grpo.advantage.baseline=leave_one_out"])
    assert (config.loss.clip_ratio_high, config.grpo.advantage.baseline) == (0.5, "leave_one_out")
    assert config.grpo.dynamic_sampling.enabled
    assert config.grpo.dynamic_sampling.max_generation_batches == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=dappo"], "there is no recipe 'dappo'.*dapo"),
        (["loss.objective=cispo", "loss.dual_clip=3"], "dual_clip has no effect with objective=cispo"),
        (["loss.importance_floor=3"], "importance_floor=3 is above importance_cap=2"),
        (["grpo.overlong_penalty.buffer_tokens=100000"], "exceeds policy.generation.max_new_tokens"),
    ],
)
def test_invalid_combination_is_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(MasterConfig, None, overrides)


def test_recipe_of_a_section_made_in_python() -> None:
    config = MasterConfig(loss=LossConfig(recipe="dapo", clip_ratio_high=0.5), grpo=GRPOConfig(max_num_steps=7))
    assert config.grpo.dynamic_sampling.enabled
    assert (config.grpo.max_num_steps, config.loss.clip_ratio_high) == (7, 0.5)
    assert config.loss.aggregation == "token"
    assert MasterConfig(loss=LossConfig(kl_coef=0.5)).loss.kl_coef == 0.5


def test_constant_length_defaults_to_the_completion_limit() -> None:
    config = load_config(MasterConfig, None, ["loss=dr_grpo", "policy.generation.max_new_tokens=12"])
    assert config.resolved_loss.constant_length == 12
