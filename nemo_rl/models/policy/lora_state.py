"""The trained state of a model with LoRA adapters, for checkpoints and for generation workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_rl.models.policy.config import LoraConfig
from nemo_rl.models.policy.lora import peft_config
from nemo_rl.models.policy.optimizer import PolicyOptimizer
from nemo_rl.models.policy.parallel_model import ParallelModel, TensorReader
from nemo_rl.models.policy.policy_checkpoint import TorchState, agree

ADAPTER_DIRECTORY = "adapter"
_BASE = ".base_layer."
_ADAPTER = ".lora_"
_NAME = ".default"  # peft's name of the only adapter
_VALUE = "value"  # key of an adapter's weights among the optimizer's state


class LoraState(TorchState):
    """The `TrainedState` of a model with adapters: as weights it has the merged ones, under the model's own names.

    A checkpoint holds the merged model, the adapters as `peft` loads them, and, beside the optimizer's state, the
    adapters in full precision, from which training continues. The frozen weights come from `policy.model_name`.
    """

    def __init__(self, model: ParallelModel, optimizer: PolicyOptimizer, config: LoraConfig, model_name: str) -> None:
        super().__init__(model, optimizer)
        self._config, self._model_name = config, model_name

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {
            name.replace(_BASE, "."): parameter.shape
            for name, parameter in self._model.parameters().items()
            if _ADAPTER not in name
        }

    @property
    def optimizer_keys(self) -> list[str]:
        return [*super().optimizer_keys, *(f"{name}/{_VALUE}" for name in self._optimizer.names)]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the merged weights in the model's order, gathered one at a time. A collective: exhaust it."""
        parameters = self._model.parameters()
        modules = dict(self._model.module.named_modules())
        for name, parameter in parameters.items():
            if _ADAPTER in name:
                continue
            full = self._model.full(parameter.detach())
            layer, is_adapted, _ = name.partition(f"{_BASE}weight")
            if is_adapted:
                full = full + self._change(modules[layer], full.dtype)
            yield name.replace(_BASE, "."), full

    def served_weights(self, *, on_all_ranks: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        return self.weights()

    def _change(self, layer: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return (alpha / rank) B A of an adapted layer, with the shape of its weight. A collective."""
        a, b = (
            self._model.full(getattr(layer, part)["default"].weight.detach()).float() for part in ("lora_A", "lora_B")
        )
        change = (b @ a) * layer.scaling["default"]
        return (change.T if layer.fan_in_fan_out else change).to(dtype)

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().moments()
        parameters = self._model.parameters()
        for name in self._optimizer.names:
            yield f"{name}/{_VALUE}", self._model.full(parameters[name].detach())

    def load(self, weight: TensorReader | None, moment: TensorReader | None) -> None:
        self._check_frozen_weights(weight)
        self._load_moments(moment)
        parameters = self._model.parameters()
        with torch.no_grad():
            for name in self._optimizer.names:
                self._model.copy_from_rank_0(parameters[name], None if moment is None else moment(f"{name}/{_VALUE}"))

    def _check_frozen_weights(self, weight: TensorReader | None) -> None:
        """Raise `CheckpointError` on all ranks if the layers without adapters are not those of the checkpoint."""
        error = None
        for name, parameter in self._model.parameters().items():
            if _ADAPTER in name or f"{_BASE}weight" in name:
                continue
            full = self._model.full(parameter.detach())
            own_name = name.replace(_BASE, ".")
            if weight is not None and not torch.equal(full.cpu(), weight(own_name).to(full.dtype)):
                error = error or (
                    f"its adapters belong to another model than policy.model_name={self._model_name}: {own_name} "
                    "differs. Set policy.model_name to the model with which the run began"
                )
        agree(self._model.group, error, "cannot load the checkpoint")

    def extra_files(self) -> Callable[[Path], None]:
        """Return what writes the adapters as `peft` loads them. A collective."""
        tensors = {
            f"base_model.model.{name.replace(_NAME, '')}": self._model.full(parameter.detach()).cpu().contiguous()
            for name, parameter in self._model.parameters().items()
            if _ADAPTER in name
        }
        config = peft_config(self._config, task_type="CAUSAL_LM", base_model_name_or_path=self._model_name)

        def write(directory: Path) -> None:
            adapter = directory / ADAPTER_DIRECTORY
            adapter.mkdir()
            config.save_pretrained(str(adapter))
            save_file(tensors, adapter / "adapter_model.safetensors")

        return write
