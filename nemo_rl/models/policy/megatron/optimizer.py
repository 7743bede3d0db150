"""megatron-core's (distributed) optimizer with the project's schedule, clipping and check for non-finite gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.megatron.config import MegatronOptions
from nemo_rl.models.policy.optimizer import check_finite, learning_rate_factor

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


class MegatronOptimizer:
    """Takes AdamW steps over this rank's parameters, with float32 master weights.

    Weight decay applies to matrices only. With the distributed optimizer, every data-parallel rank holds a share of the
    master weights and moments.

    Attributes:
        num_steps: optimizer steps taken so far, including those before a restart.
    """

    def __init__(
        self, model: DistributedDataParallel, policy: PolicyConfig, options: MegatronOptions, *, total_steps: int
    ) -> None:
        self._policy = policy
        self._total_steps = policy.scheduler.total_steps or total_steps
        self._num_steps = 0
        bfloat16 = policy.precision == "bfloat16"
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=policy.optimizer.lr,
            weight_decay=policy.optimizer.weight_decay,
            adam_beta1=policy.optimizer.betas[0],
            adam_beta2=policy.optimizer.betas[1],
            adam_eps=policy.optimizer.eps,
            bf16=bfloat16,
            params_dtype=torch.bfloat16 if bfloat16 else torch.float32,
            use_distributed_optimizer=options.distributed_optimizer,
            clip_grad=policy.max_grad_norm or 0.0,
        )
        # The first optimizer of the chain has all parameters but those of experts, which are in the second, if any.
        self._optimizer = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
        self._chain: list[Any] = self._optimizer.chained_optimizers
        self._model = model
        self._start_states()

    def _start_states(self) -> None:
        for part in self._chain:
            adamw = part.optimizer
            for group in adamw.param_groups:
                group.update(fused=True, foreach=False)
                for parameter in group["params"]:
                    adamw.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        **{key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS},
                    }

    @property
    def num_steps(self) -> int:
        return self._num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        self._num_steps = value
        for part in self._chain:
            for state in part.optimizer.state.values():
                state["step"].fill_(value)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        factor = learning_rate_factor(self._policy.scheduler, self._total_steps, self._num_steps)
        return self._policy.optimizer.lr * factor

    def zero_grad(self) -> None:
        """Set the gradients to zero."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self, loss: float) -> float:
        """Clip and step; returns the L2 norm over all ranks before clipping. A collective.

        Raises:
            NonFiniteError: `loss` (over all ranks) or the norm is not finite. The weights are unchanged.
        """
        self._optimizer.prepare_grads()
        norm, lr = float(self._optimizer.get_grad_norm()), self.lr
        check_finite(self._num_steps + 1, loss, norm, lr)
        if self._policy.max_grad_norm is not None:
            parameters = [parameter for part in self._chain for parameter in part.get_parameters()]
            clip_grad_by_total_norm_fp32(parameters, self._policy.max_grad_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self._policy.optimizer.weight_decay * group["wd_mult"]
        self._optimizer.step_with_ready_grads()
        self._num_steps += 1
        return norm

    def release_gradients(self) -> None:
        """Drop the gradients and free their buffers until `allocate_gradients`."""
        self._optimizer.zero_grad()  # frees gradients that it has cast to float32
        self._model.offload_grad_buffers()

    def allocate_gradients(self) -> None:
        """Allocate the gradient buffers again; they are zero."""
        self._model.restore_grad_buffers(synchronize=False)

    def state_tensors(self) -> Iterator[torch.Tensor]:
        """Yield this rank's moments, and its master weights if they do not share memory with the weights."""
        weight_addresses = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}
        for part in self._chain:
            for group in part.param_groups:
                for main in group["params"]:
                    if main.untyped_storage().data_ptr() not in weight_addresses:
                        yield main
                    yield from part.optimizer.state[main].values()

    def read(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """Return the master weight or a moment of one of this rank's parameters, float32, in its shape.

        With the distributed optimizer this is a collective of the ranks that hold the same parameter.
        """
        optimizer = self._part_of(parameter)
        if not isinstance(optimizer, DistributedOptimizer):
            return _state_of(optimizer, _main(parameter), key).detach().view(parameter.shape)
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        for part, tensor in self._local_part(parameter, key):
            full[part] = tensor.detach()
        dist.all_reduce(full, group=optimizer.data_parallel_group)
        return full.view(parameter.shape)

    def write(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Write what `read` returns. A master weight is also written to the parameter. Not a collective."""
        with torch.no_grad():
            if key == WEIGHT:
                parameter.copy_(value)
            optimizer = self._part_of(parameter)
            if not isinstance(optimizer, DistributedOptimizer):
                _state_of(optimizer, _main(parameter), key).copy_(value)
                return
            for part, tensor in self._local_part(parameter, key):
                tensor.copy_(value.reshape(-1)[part])

    def _local_part(self, parameter: nn.Parameter, key: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield this rank's slice of the flat parameter and its tensor; nothing if it has no share."""
        optimizer = self._part_of(parameter)
        places = optimizer.model_param_group_index_map
        if parameter in places:
            bounds = optimizer._get_model_param_range_map(parameter)["param"]
            group, index = places[parameter]
            main = optimizer.optimizer.param_groups[group]["params"][index]
            yield slice(bounds.start, bounds.end), _state_of(optimizer, main, key).view(-1)

    def _part_of(self, parameter: nn.Parameter) -> Any:
        """Return the optimizer of the chain that has this parameter."""
        return self._chain[0] if getattr(parameter, "allreduce", True) else self._chain[1]


def _state_of(optimizer: Any, main: torch.Tensor, key: str) -> torch.Tensor:
    if key == WEIGHT:
        return main
    tensor: torch.Tensor = optimizer.optimizer.state[main][key]
    return tensor


def _main(parameter: nn.Parameter) -> torch.Tensor:
    """Return the float32 parameter that AdamW updates: a copy of a bfloat16 parameter, else the parameter itself."""
    main: torch.Tensor = getattr(parameter, "main_param", parameter)
    return main
