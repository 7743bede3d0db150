"""Advantages from rewards, within the group of completions of one prompt.

For the valid rewards r_1..r_n of one group (masked samples count neither in n nor in any sum):

    leave_one_out   A_i = r_i - sum_{j != i} r_j / (n - 1)
                    Kool, van Hoof & Welling (2019), "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; for language
                    models Ahmadian et al. (2024), arXiv:2402.14740, the RLOO estimator. Unbiased, because the
                    baseline does not depend on sample i. Equal to n / (n - 1) times the mean-baseline advantage.
    mean            A_i = r_i - sum_j r_j / n
                    Shao et al. (2024), GRPO, arXiv:2402.03300, section 4.1.2, the numerator.
    normalize_std   A_i / (s + 1e-6), with s^2 = sum_j (r_j - mean)^2 / (n - 1)
                    Same section, the denominator. Liu et al. (2025), "Dr. GRPO", arXiv:2503.20783, section 3.1, show
                    the cost: groups that are nearly all right or all wrong weigh more than in the objective.

    none            A_i = r_i

With `normalize_over: batch`, the advantages of the whole batch are normalized instead: A = (A - mean) / (s + 1e-6) over
all valid samples, or over all counted tokens if the advantages differ by token: Hu et al. (2025), REINFORCE++,
arXiv:2501.03262, equation 9.

With `loss.kl_placement`, the estimates of KL(pi || pi_ref) (see `loss_functions.ClippedPGLoss`) count in the reward:

    reward          r_i - kl_coef * sum_t KL_it, before the baseline: Ahmadian et al. (2024), section 3.1
    reward_to_go    A_it = A_i - kl_coef * sum_{s >= t} KL_is, an advantage per token: Hu et al. (2025), equation 8

With either baseline, the standard deviation is taken over all valid rewards of the group. The leave-one-out deviation
would not work: if one sample alone differs from the rest, the deviation of the others is 0, and the only informative
sample of the group would get an infinite advantage or none. The deviation is Bessel-corrected, as in common
implementations; the paper does not specify this.

Without such a term, and unless `baseline` is none, the advantage is exactly 0 for masked samples, for groups with a
single valid sample, and for groups whose valid rewards are all equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nemo_rl.errors import EnvironmentFailure

if TYPE_CHECKING:
    from nemo_rl.algorithms.config import AdvantageConfig

# Prevents rewards that differ only by rounding from being scaled to unit variance.
STD_EPSILON = 1e-6


def compute_advantages(
    rewards: torch.Tensor,
    groups: torch.Tensor | int,
    config: AdvantageConfig,
    sample_mask: torch.Tensor | None = None,
    *,
    token_penalties: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the advantages of a batch of samples with the formulas at the top of this module.

    Example:
        >>> import torch
        >>> from nemo_rl.algorithms.config import AdvantageConfig
        >>> config = AdvantageConfig(baseline="leave_one_out", normalize_std=False)
        >>> compute_advantages(torch.tensor([1.0, 0.0, 2.0, 4.0]), 2, config)
        tensor([ 1., -1., -2.,  2.])

    Args:
        rewards: [B] real numbers.
        groups: [B] integer ids, equal for the completions of one prompt, in any order; or the number of completions
            per prompt, if the completions of a prompt are adjacent.
        config: the baseline, and whether to divide by the standard deviation.
        sample_mask: [B]; 0 excludes a sample from its group. None counts all samples.
        token_penalties: [B, T]; each token's advantage is reduced by the sum over the tokens from it on. None: none.
        token_mask: [B, T]; 0 excludes a token. Required with `token_penalties`.

    Returns:
        [B], or [B, T] with `token_penalties`; float32 (float64 for float64 rewards), on the rewards' device.

    Raises:
        ValueError: shapes, dtypes or the group size do not fit.
        EnvironmentFailure: the reward of a valid sample is NaN or infinite.
    """
    valid, index, num_groups = _group_index(rewards, groups, sample_mask)
    # float64, so that the order of the samples changes the result by no more than float32's resolution.
    values = torch.where(valid, rewards.double(), 0.0)
    counts = _group_sum(valid.double(), index, num_groups)
    means = _group_sum(values, index, num_groups) / counts.clamp(min=1.0)
    deviations = torch.where(valid, values - means[index], 0.0)
    advantages = values if config.baseline == "none" else deviations
    if config.baseline == "leave_one_out":
        advantages = deviations * (counts / (counts - 1.0).clamp(min=1.0))[index]
    if config.baseline != "none":
        # Equal rewards must give exactly 0, although rounding may move their mean away from them.
        differ = _rewards_differ(values, valid, index, num_groups)[index]
        advantages = torch.where(differ, advantages, 0.0)
    counted = valid
    if token_penalties is not None:
        assert token_mask is not None, "token_penalties need a token_mask"
        counted = valid[:, None] & (token_mask > 0)
        penalties = torch.where(counted, token_penalties.double(), 0.0)
        to_go = penalties.flip(1).cumsum(1).flip(1)
        advantages = advantages[:, None] - to_go
    if config.normalize_std and config.normalize_over == "batch":
        mean, deviation = _moments(advantages[counted])
        advantages = (advantages - mean) / (deviation + STD_EPSILON)
    elif config.normalize_std:
        variances = _group_sum(deviations.square(), index, num_groups) / (counts - 1.0).clamp(min=1.0)
        scale = (variances.sqrt() + STD_EPSILON)[index]
        advantages = advantages / (scale if token_penalties is None else scale[:, None])
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return torch.where(counted, advantages, 0.0).to(dtype)


def turn_advantages(
    turn_rewards: torch.Tensor,
    num_turns: torch.Tensor,
    groups: torch.Tensor,
    config: AdvantageConfig,
    sample_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute one advantage for each turn of each episode.

    The return of turn t is sum over k >= t of discount**(k - t) * reward k. It is compared with the returns of turn t
    in the other episodes of the group that have such a turn, as rewards of episodes are compared: a baseline that
    depends on the time step (Greensmith et al. 2004, "Variance Reduction Techniques for Gradient Estimates in
    Reinforcement Learning", section 3). A turn that no other episode of its group has gets the advantage 0, unless the
    baseline is "none".

    Args:
        turn_rewards: [B, K] the reward of each turn; those behind an episode's last turn are not read.
        num_turns: [B] int64 turns of each episode.
        groups: [B] integer ids, equal for the episodes of one problem.
        config: the discount, the baseline, and whether to divide by the standard deviation.
        sample_mask: [B]; 0 excludes an episode. None counts all.

    Returns:
        [B, K] float32 (float64 for float64 rewards); 0 behind the last turn. `at_turns` assigns them to tokens.
    """
    most_turns = turn_rewards.shape[1]
    turns = torch.arange(most_turns, device=turn_rewards.device)
    exists = turns < num_turns[:, None]
    if sample_mask is not None:
        exists &= sample_mask[:, None] > 0
    rewards = torch.where(exists, turn_rewards.double(), 0.0)
    returns = rewards.clone()
    for turn in range(most_turns - 2, -1, -1):
        returns[:, turn] += config.discount * returns[:, turn + 1]
    ids = groups[:, None] * most_turns + turns
    advantages = compute_advantages(returns.flatten(), ids.flatten(), config, exists.flatten().double())
    return advantages.view_as(turn_rewards).to(turn_rewards.dtype)


def at_turns(values: torch.Tensor, turn_index: torch.Tensor) -> torch.Tensor:
    """Assign the values of turns to the tokens of these turns.

    Args:
        values: [R, K] a value for each turn of each row.
        turn_index: [R, T] int64 the turn whose action a token belongs to, from 1; 0 for other tokens.

    Returns:
        [R, T]; 0 at tokens of no turn.
    """
    return torch.cat([values.new_zeros(len(values), 1), values], dim=1).gather(1, turn_index)


def _moments(values: torch.Tensor) -> tuple[float, float]:
    """Return the mean and the (Bessel-corrected) standard deviation; (0, 0) of nothing."""
    if not len(values):
        return 0.0, 0.0
    return float(values.mean()), float(values.std()) if len(values) > 1 else 0.0


def overlong_penalties(lengths: torch.Tensor, max_length: int, buffer: int, factor: float) -> torch.Tensor:
    """Compute the soft overlong punishment of DAPO: Yu et al. (2025), arXiv:2503.14476, equation 13.

    Args:
        lengths: [B] tokens of the completions.
        max_length: the limit L_max in tokens.
        buffer: L_cache, the tokens before the limit over which the punishment grows from 0 to 1.
        factor: the punishment at the limit.

    Returns:
        [B] values between -factor and 0, to be added to the rewards.

    Example:
        >>> import torch
        >>> overlong_penalties(torch.tensor([80, 90, 100]), max_length=100, buffer=20, factor=1.0)
        tensor([-0.0000, -0.5000, -1.0000])
    """
    return -factor * ((lengths - (max_length - buffer)).clamp(0, buffer) / buffer)


def group_has_signal(
    rewards: torch.Tensor, groups: torch.Tensor | int, sample_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mark the samples of groups that have a learning signal: at least two valid samples with different rewards.

    Dynamic sampling keeps these groups and replaces the others: Yu et al. (2025), DAPO, arXiv:2503.14476, equation 11
    (stated there for binary rewards: neither all right nor all wrong).

    Arguments and errors are those of `compute_advantages`.

    Returns:
        [B] bool, equal for all samples of a group, masked samples included.
    """
    valid, index, num_groups = _group_index(rewards, groups, sample_mask)
    values = torch.where(valid, rewards.double(), 0.0)
    return _rewards_differ(values, valid, index, num_groups)[index]


def _group_index(
    rewards: torch.Tensor, groups: torch.Tensor | int, sample_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Check the arguments; return validity [B] bool, dense group index [B], and the number of groups."""
    if rewards.ndim != 1:
        raise ValueError(f"rewards must have the shape [B], got {list(rewards.shape)}")
    if isinstance(groups, int):
        if groups < 1 or len(rewards) % groups:
            raise ValueError(f"{len(rewards)} rewards cannot be split into groups of {groups}")
        index = torch.arange(len(rewards), device=rewards.device) // groups
        num_groups = len(rewards) // groups
    else:
        if groups.shape != rewards.shape or groups.is_floating_point():
            raise ValueError(
                f"group ids must be integers of the shape {list(rewards.shape)} of the rewards, "
                f"got {groups.dtype} {list(groups.shape)}"
            )
        ids, index = torch.unique(groups.to(rewards.device), return_inverse=True)
        num_groups = len(ids)
    if sample_mask is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    elif sample_mask.shape != rewards.shape:
        raise ValueError(f"sample_mask has the shape {list(sample_mask.shape)}, the rewards {list(rewards.shape)}")
    else:
        valid = sample_mask.to(rewards.device) > 0
    broken = (valid & ~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if broken:
        raise EnvironmentFailure(
            f"the reward of sample {broken[0]} is {rewards[broken[0]].item()} "
            f"({len(broken)} of {len(rewards)} samples): a reward must be finite; "
            "exclude a sample that could not be graded with sample_mask=0"
        )
    return valid, index, num_groups


def _group_sum(values: torch.Tensor, index: torch.Tensor, num_groups: int) -> torch.Tensor:
    return values.new_zeros(num_groups).index_add_(0, index, values)


def _rewards_differ(values: torch.Tensor, valid: torch.Tensor, index: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[number of groups] bool: True where the valid values of a group are not all equal."""
    low = values.new_full((num_groups,), torch.inf)
    high = -low
    low = low.scatter_reduce(0, index, torch.where(valid, values, torch.inf), "amin")
    high = high.scatter_reduce(0, index, torch.where(valid, values, -torch.inf), "amax")
    return high > low
