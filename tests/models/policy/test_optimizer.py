from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nemo_rl.errors import NonFiniteError
from nemo_rl.models.policy.config import OptimizerConfig, SchedulerConfig
from nemo_rl.models.policy.optimizer import PolicyOptimizer, learning_rate_factor


def factors(config: SchedulerConfig, total: int, steps: int) -> list[float]:
    return [learning_rate_factor(config, total, step) for step in range(steps)]


def test_constant_schedule_after_warm_up() -> None:
    config = SchedulerConfig(warmup_steps=4)
    assert factors(config, 10, 7) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_linear_schedule_ends_at_total_steps() -> None:
    config = SchedulerConfig(kind="linear", warmup_steps=2, min_lr_ratio=0.2)
    assert factors(config, 6, 8) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_schedule() -> None:
    config = SchedulerConfig(kind="cosine", min_lr_ratio=0.1)
    assert factors(config, 4, 6) == pytest.approx(
        [
            1.0,
            0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)),
            0.55,
            0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi / 4)),
            0.1,
            0.1,
        ]
    )


def test_warm_up_of_the_whole_run() -> None:
    assert factors(SchedulerConfig(kind="linear", warmup_steps=3), 3, 4) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def make(max_grad_norm: float | None, **optimizer: float) -> tuple[dict[str, nn.Parameter], PolicyOptimizer]:
    parameters = {"matrix": nn.Parameter(torch.ones(2, 2)), "bias": nn.Parameter(torch.ones(2))}
    config = OptimizerConfig(lr=0.1, **optimizer)
    return parameters, PolicyOptimizer(
        parameters, config, SchedulerConfig(), total_steps=10, max_grad_norm=max_grad_norm
    )


def test_clipping_returns_the_norm_before() -> None:
    parameters, optimizer = make(1.0)
    parameters["matrix"].grad = torch.full((2, 2), 3.0)
    parameters["bias"].grad = torch.tensor([0.0, 8.0])
    assert optimizer.step(0.5) == pytest.approx(10.0)
    seen = optimizer.state("matrix")["exp_avg"] / (1 - 0.9)
    torch.testing.assert_close(seen, torch.full((2, 2), 0.3))


def test_no_clipping_without_max_grad_norm() -> None:
    parameters, optimizer = make(None)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer.step(0.5)
    torch.testing.assert_close(optimizer.state("bias")["exp_avg"], torch.full((2,), 10.0))


def test_weight_decay_applies_to_matrices_only() -> None:
    parameters, optimizer = make(None, weight_decay=0.5)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0)
    torch.testing.assert_close(parameters["matrix"].detach(), torch.full((2, 2), 1 - 0.1 * 0.5))
    torch.testing.assert_close(parameters["bias"].detach(), torch.ones(2))


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_non_finite_step_is_refused(loss: float, gradient: float) -> None:
    parameters, optimizer = make(1.0)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, gradient)
    with pytest.raises(NonFiniteError, match=r"optimizer step 1: .*learning rate 0\.1"):
        optimizer.step(loss)
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in parameters.values())
    assert all(parameter.grad is None for parameter in parameters.values())
    assert optimizer.num_steps == 0
