"""AdamW with a learning-rate schedule, clipping of the global norm, and a check for non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_rl.errors import NonFiniteError
from nemo_rl.models.policy.config import OptimizerConfig, SchedulerConfig


def learning_rate_factor(config: SchedulerConfig, total_steps: int, step: int) -> float:
    """Return the learning rate at optimizer step `step` (0 is the first) as a fraction of the peak.

    Warm-up rises linearly and reaches 1 at its last step; its first step has a positive rate. Then `linear` and
    `cosine` fall from 1 to `min_lr_ratio` at `total_steps` and stay there.

    Example:
        >>> config = SchedulerConfig(kind="linear", warmup_steps=2)
        >>> [learning_rate_factor(config, 6, step) for step in range(4)]
        [0.5, 1.0, 1.0, 0.75]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    shape = 1.0 - done if config.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape


def check_finite(step: int, loss: float, norm: float, lr: float) -> None:
    """Raise `NonFiniteError` if the loss or the gradient norm of an optimizer step is not finite."""
    if not (math.isfinite(norm) and math.isfinite(loss)):
        raise NonFiniteError(
            f"optimizer step {step}: loss {loss}, gradient norm {norm}, learning rate {lr:.3g}. "
            "The weights are unchanged. Lower policy.optimizer.lr or policy.max_grad_norm, or look for samples "
            "with extreme advantages or log-probabilities"
        )


STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")


class PolicyOptimizer:
    """Takes optimizer steps over named parameters (float32, possibly sharded).

    Weight decay applies to matrices only, not to biases and the weights of norms.

    Attributes:
        num_steps: optimizer steps taken so far, including those before a restart.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: OptimizerConfig,
        scheduler: SchedulerConfig,
        *,
        total_steps: int,
        max_grad_norm: float | None,
    ) -> None:
        self.num_steps = 0
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._peak_lr = optimizer.lr
        self._scheduler = scheduler
        self._total_steps = scheduler.total_steps or total_steps
        self._max_grad_norm = max_grad_norm
        decayed = [parameter for parameter in self._parameters.values() if parameter.ndim > 1]
        plain = [parameter for parameter in self._parameters.values() if parameter.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": optimizer.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._peak_lr * learning_rate_factor(self._scheduler, self._total_steps, self.num_steps)

    def zero_grad(self) -> None:
        """Delete the gradients and free their memory."""
        self._adamw.zero_grad(set_to_none=True)

    def step(self, loss: float) -> float:
        """Clip, step, delete the gradients; returns the global L2 norm before clipping. A collective if sharded.

        Raises:
            NonFiniteError: `loss` (over all ranks) or the norm is not finite. The weights are unchanged and the
                gradients deleted.
        """
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        total = total.full_tensor() if isinstance(total, DTensor) else total
        norm, lr = float(total), self.lr
        try:
            check_finite(self.num_steps + 1, loss, norm, lr)
        except NonFiniteError:
            self.zero_grad()
            raise
        if self._max_grad_norm is not None and norm > self._max_grad_norm:
            torch._foreach_mul_(gradients, self._max_grad_norm / (norm + 1e-6))
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.zero_grad()
        self.num_steps += 1
        return norm

    def state_tensors(self) -> Iterator[torch.Tensor]:
        """Yield the state of AdamW; nothing before the first step."""
        for state in self._adamw.state.values():
            yield from state.values()

    @property
    def names(self) -> list[str]:
        """Names of the trained parameters, in the model's order."""
        return list(self._parameters)

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Return AdamW's state of a parameter: the scalar `step`, and `exp_avg`, `exp_avg_sq`, sharded like it.

        The tensors belong to the optimizer: fill them in place to restore a state. They are 0 before the first step.
        """
        parameter = self._parameters[name]
        state: dict[str, torch.Tensor] = self._adamw.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return {key: state[key] for key in STATE_KEYS}
