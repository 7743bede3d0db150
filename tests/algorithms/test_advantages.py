"""Compares advantages with hand-computed values, an independent slow reference, and invariants."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.algorithms.advantages import STD_EPSILON, at_turns, compute_advantages, group_has_signal, turn_advantages
from nemo_rl.algorithms.config import AdvantageConfig
from nemo_rl.errors import EnvironmentFailure

PLAIN_RLOO = AdvantageConfig(baseline="leave_one_out", normalize_std=False)
PLAIN_MEAN = AdvantageConfig(baseline="mean", normalize_std=False)
Batch = tuple[list[float], list[int], list[float]]
CONFIGS = [AdvantageConfig(baseline=b, normalize_std=n) for b in ("leave_one_out", "mean") for n in (False, True)]


def slow_reference(rewards: list[float], groups: list[int], mask: list[float], config: AdvantageConfig) -> list[float]:
    """Compute the formulas sample by sample with the standard library."""
    result = []
    for i, reward in enumerate(rewards):
        group = [j for j in range(len(rewards)) if groups[j] == groups[i] and mask[j] > 0]
        others = [rewards[j] for j in group if j != i]
        if i not in group or len({rewards[j] for j in group}) < 2:
            result.append(0.0)
            continue
        values = [rewards[j] for j in group]
        value = reward - (statistics.mean(others) if config.baseline == "leave_one_out" else statistics.mean(values))
        result.append(value / (statistics.stdev(values) + STD_EPSILON) if config.normalize_std else value)
    return result


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    size = draw(st.integers(1, 24))
    # Sixteenths are exact in float32, so equal rewards are also equal in the reference.
    reward = st.integers(-32, 32).map(lambda k: k / 16)
    return (
        draw(st.lists(reward, min_size=size, max_size=size)),
        draw(st.lists(st.integers(-3, 4), min_size=size, max_size=size)),
        draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=size, max_size=size)),
    )


def test_leave_one_out_by_hand() -> None:
    # Group of (1, 0, 0, 0): 1 - 0 and 0 - 1/3. Group of (2, 4): 2 - 4 and 4 - 2.
    advantages = compute_advantages(torch.tensor([1.0, 0, 0, 0]), 4, PLAIN_RLOO)
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    torch.testing.assert_close(compute_advantages(torch.tensor([2.0, 4.0]), 2, PLAIN_RLOO), torch.tensor([-2.0, 2.0]))


def test_mean_baseline_by_hand() -> None:
    advantages = compute_advantages(torch.tensor([1.0, 0, 0, 0]), 4, PLAIN_MEAN)
    torch.testing.assert_close(advantages, torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_std_by_hand() -> None:
    # (1, 0, 0, 0): mean 1/4, squared deviations 9/16 + 3/16, over n - 1 = 3: variance 1/4, deviation 1/2.
    rewards = torch.tensor([1.0, 0, 0, 0])
    advantages = compute_advantages(rewards, 4, AdvantageConfig(baseline="mean", normalize_std=True))
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]), rtol=1e-5, atol=0)
    # Leave-one-out divides by the deviation of the group, not by that of the three equal other samples (0).
    advantages = compute_advantages(rewards, 4, AdvantageConfig(baseline="leave_one_out", normalize_std=True))
    torch.testing.assert_close(advantages, torch.tensor([2.0, -2 / 3, -2 / 3, -2 / 3]), rtol=1e-5, atol=0)


def test_masked_samples_do_not_affect_baseline_and_std() -> None:
    rewards, mask = torch.tensor([1.0, 0.0, 100.0, 5.0, 7.0, 9.0]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    advantages = compute_advantages(rewards, 3, PLAIN_RLOO, mask)
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1.0, 0.0, -3.0, 0.0, 3.0]))


def test_masked_reward_may_be_nan() -> None:
    advantages = compute_advantages(torch.tensor([1.0, 0.0, math.nan]), 3, PLAIN_RLOO, torch.tensor([1.0, 1.0, 0.0]))
    assert advantages.tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("reward", [0.0, 0.1, -1 / 3, 1e8])
def test_equal_rewards_give_exactly_zero(config: AdvantageConfig, reward: float) -> None:
    assert compute_advantages(torch.full((7,), reward), 7, config).tolist() == [0.0] * 7


@pytest.mark.parametrize("config", CONFIGS)
def test_single_valid_sample_gives_zero(config: AdvantageConfig) -> None:
    advantages = compute_advantages(torch.tensor([3.0, 1.0]), 2, config, torch.tensor([1.0, 0.0]))
    assert advantages.tolist() == [0.0, 0.0]


def test_rounding_noise_is_not_amplified() -> None:
    rewards = torch.tensor([0.5, 0.5 + 1e-10, 0.5, 0.5], dtype=torch.float64)
    assert compute_advantages(rewards, 4, AdvantageConfig()).abs().max().item() < 1e-3


def test_dtype_follows_the_rewards() -> None:
    assert compute_advantages(torch.tensor([1, 0]), 2, PLAIN_RLOO).dtype == torch.float32
    assert compute_advantages(torch.tensor([1.0, 0.0]).double(), 2, PLAIN_RLOO).dtype == torch.float64


@settings(max_examples=200, deadline=None)
@given(batches(), st.sampled_from(CONFIGS))
def test_equals_the_slow_reference(batch: Batch, config: AdvantageConfig) -> None:
    rewards, groups, mask = batch
    advantages = compute_advantages(torch.tensor(rewards), torch.tensor(groups), config, torch.tensor(mask))
    expected = torch.tensor(slow_reference(rewards, groups, mask, config))
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from(CONFIGS), st.randoms(use_true_random=False))
def test_sample_order_does_not_matter(batch: Batch, config: AdvantageConfig, rng: random.Random) -> None:
    rewards, groups, mask = (torch.tensor(column) for column in batch)
    order = list(range(len(rewards)))
    rng.shuffle(order)
    straight = compute_advantages(rewards, groups, config, mask)[order]
    shuffled = compute_advantages(rewards[order], groups[order], config, mask[order])
    torch.testing.assert_close(shuffled, straight)


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from(CONFIGS))
def test_advantages_of_a_group_sum_to_zero(batch: Batch, config: AdvantageConfig) -> None:
    rewards, groups, mask = (torch.tensor(column) for column in batch)
    advantages = compute_advantages(rewards, groups, config, mask)
    for group in groups.unique():
        assert abs(advantages[groups == group].sum().item()) < 1e-4


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from([-2.0, 0.5, 8.0]))
def test_normalised_advantages_ignore_shift_and_scale(batch: Batch, shift: float) -> None:
    rewards, groups, mask = (torch.tensor(column, dtype=torch.float64) for column in batch)
    config, ids = AdvantageConfig(normalize_std=True), groups.long()
    straight = compute_advantages(rewards, ids, config, mask)
    torch.testing.assert_close(
        compute_advantages(4 * rewards + shift, ids, config, mask), straight, rtol=1e-3, atol=1e-6
    )


def test_only_leave_one_out_is_unbiased() -> None:
    """The expected gradient with the leave-one-out baseline is the gradient of the expected reward (Kool et al.).

    The test enumerates all four outcomes of two samples of a biased coin p with reward 1 for heads.
    d E[r] / d theta = p (1 - p) for p = sigmoid(theta), and grad log pi is 1 - p for heads, -p for tails.
    """
    p = 0.3
    expected = dict.fromkeys(("leave_one_out", "mean"), 0.0)
    for baseline in expected:
        config = AdvantageConfig(baseline=baseline, normalize_std=False)  # type: ignore[arg-type]
        for first in (0, 1):
            for second in (0, 1):
                probability = (p if first else 1 - p) * (p if second else 1 - p)
                advantages = compute_advantages(torch.tensor([first, second], dtype=torch.float64), 2, config)
                scores = torch.tensor([(1 - p) if c else -p for c in (first, second)], dtype=torch.float64)
                expected[baseline] += probability * (advantages * scores).mean().item()
    assert expected["leave_one_out"] == pytest.approx(p * (1 - p))
    assert expected["mean"] == pytest.approx(p * (1 - p) / 2)  # smaller by (n - 1) / n


def test_group_has_signal() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert group_has_signal(rewards, 2).tolist() == [True, True, False, False, True, True, False, False]
    masked = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    assert group_has_signal(rewards, 2, masked).tolist() == [True, True, *[False] * 6]
    ids = torch.tensor([7, 7, 7, 7, -1, -1, -1, -1])
    assert group_has_signal(rewards, ids).tolist() == [True] * 8
    assert group_has_signal(torch.full((8,), 0.1), ids).tolist() == [False] * 8


@settings(max_examples=100, deadline=None)
@given(batches())
def test_signal_means_nonzero_advantages(batch: Batch) -> None:
    rewards, groups, mask = (torch.tensor(column) for column in batch)
    signal = group_has_signal(rewards, groups, mask)
    advantages = compute_advantages(rewards, groups, PLAIN_RLOO, mask)
    for group in groups.unique():
        members = groups == group
        assert signal[members].all() == signal[members].any() == (advantages[members] != 0).any()


@pytest.mark.parametrize(
    ("rewards", "groups", "mask", "message"),
    [
        (torch.zeros(2, 2), 2, None, "shape"),
        (torch.zeros(5), 2, None, "5 rewards cannot be split into groups of 2"),
        (torch.zeros(4), 0, None, "groups of 0"),
        (torch.zeros(4), torch.zeros(3, dtype=torch.long), None, "group ids"),
        (torch.zeros(4), torch.zeros(4), None, "group ids must be integers"),
        (torch.zeros(4), 2, torch.ones(3), "sample_mask has the shape"),
    ],
)
def test_mismatched_arguments_are_refused(
    rewards: torch.Tensor, groups: torch.Tensor | int, mask: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compute_advantages(rewards, groups, PLAIN_RLOO, mask)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_non_finite_reward_is_an_error(broken: float) -> None:
    with pytest.raises(EnvironmentFailure, match="sample 1"):
        compute_advantages(torch.tensor([0.0, broken]), 2, PLAIN_RLOO)


def turns(discount: float = 1.0, baseline: str = "leave_one_out") -> AdvantageConfig:
    return AdvantageConfig(level="turn", baseline=baseline, normalize_std=False, discount=discount)


def test_advantage_of_each_turn() -> None:
    """Three episodes with two, two and one turns; their tokens are those of the turns and one of an observation."""
    rewards = torch.tensor([[1.0, 4.0], [3.0, 0.0], [5.0, 99.0]])
    index = torch.tensor([[1, 0, 2, 2], [1, 0, 2, 0], [0, 1, 1, 0]])
    groups = torch.zeros(3, dtype=torch.int64)
    num_turns = index.amax(dim=1)
    found = at_turns(turn_advantages(rewards, num_turns, groups, turns(discount=0.5)), index)
    # Returns of turn 1: 1 + 0.5 * 4 = 3, 3, 5. Of turn 2: 4, 0; the third episode has none.
    first = [3 - (3 + 5) / 2, 3 - (3 + 5) / 2, 5 - 3]
    second = [4.0, -4.0]
    expected = [
        [first[0], 0, second[0], second[0]],
        [first[1], 0, second[1], 0],
        [0, first[2], first[2], 0],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    mask = torch.tensor([1.0, 1.0, 0.0])
    masked = turn_advantages(rewards, num_turns, groups, turns(discount=0.5), mask)
    torch.testing.assert_close(masked[:, 0], torch.tensor([0.0, 0.0, 0.0]))
    assert not masked[2].any()


def test_turn_without_others_has_no_advantage() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    num_turns = torch.tensor([2, 1])
    groups = torch.zeros(2, dtype=torch.int64)
    assert turn_advantages(rewards, num_turns, groups, turns()).tolist() == [[1.0, 0.0], [-1.0, 0.0]]
    assert turn_advantages(rewards, num_turns, groups, turns(baseline="none")).tolist() == [[1.0, 1.0], [0.0, 0.0]]


@given(st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=2, max_size=6), st.booleans())
def test_one_turn_is_an_episode(rewards: list[float], normalize: bool) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    groups = torch.arange(len(rewards)) // 2
    config = AdvantageConfig(normalize_std=normalize)
    found = turn_advantages(values[:, None], torch.ones(len(rewards), dtype=torch.int64), groups, config)
    torch.testing.assert_close(found[:, 0], compute_advantages(values, groups, config))
