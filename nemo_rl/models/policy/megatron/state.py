"""The trained model and its optimizer as full Hugging Face tensors, for checkpoints and for generation workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_rl.models.policy.megatron.optimizer import MOMENTS, WEIGHT, MegatronOptimizer
from nemo_rl.models.policy.megatron.weights import WeightExchange
from nemo_rl.models.policy.optimizer import STATE_KEYS
from nemo_rl.models.policy.parallel_model import TensorReader


class MegatronState:
    """The `policy_checkpoint.TrainedState` of the Megatron backend.

    Args:
        skeleton: the Hugging Face model on the meta device.
        exchange: gathers and scatters tensors.
        optimizer: holds master weights and moments.
        dtype: the model's compute dtype.
        distributed_optimizer: whether data-parallel ranks split master weights and moments.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        exchange: WeightExchange,
        optimizer: MegatronOptimizer,
        *,
        dtype: torch.dtype,
        distributed_optimizer: bool,
    ) -> None:
        self._dtype = dtype
        self.module = skeleton
        self._exchange = exchange
        self._optimizer = optimizer
        self._from_all_replicas = distributed_optimizer

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.module.named_parameters()}

    @property
    def num_steps(self) -> int:
        return self._optimizer.num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        self._optimizer.num_steps = value

    @property
    def optimizer_keys(self) -> list[str]:
        return [f"{name}/{key}" for name in self.shapes for key in STATE_KEYS]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the float32 master weights."""
        return self._gather(WEIGHT)

    def served_weights(self, *, on_all_ranks: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights in the model's compute dtype, on rank 0 or on all ranks."""
        return self._exchange.gather(
            nn.Parameter.detach, dtype=self._dtype, from_all_replicas=False, on_all_ranks=on_all_ranks
        )

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        for key in MOMENTS:
            for name, tensor in self._gather(key):
                yield f"{name}/{key}", tensor
        for name in self.shapes:
            yield f"{name}/step", torch.tensor(float(self.num_steps))

    def _gather(self, key: str) -> Iterator[tuple[str, torch.Tensor]]:
        return self._exchange.gather(
            lambda parameter: self._optimizer.read(parameter, key),
            dtype=torch.float32,
            from_all_replicas=self._from_all_replicas,
        )

    def load_weights(self, weight: TensorReader | None) -> None:
        """Load weights by name with rank 0's reader (None on other ranks). A collective."""
        self._scatter(WEIGHT, weight)

    def load(self, weight: TensorReader | None, moment: TensorReader | None) -> None:
        self._scatter(WEIGHT, weight)
        for key in MOMENTS:
            self._scatter(key, None if moment is None else _with_suffix(moment, key))

    def extra_files(self) -> Callable[[Path], None]:
        return lambda directory: None

    def _scatter(self, key: str, read: TensorReader | None) -> None:
        self._exchange.scatter(read, lambda parameter, value: self._optimizer.write(parameter, key, value))


def _with_suffix(read: TensorReader, key: str) -> TensorReader:
    return lambda name: read(f"{name}/{key}")
