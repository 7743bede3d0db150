"""The trained state of a model with LoRA adapters, for checkpoints and for generation workers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_rl.models.policy.config import LoraConfig
from nemo_rl.models.policy.lora import peft_config
from nemo_rl.models.policy.optimizer import PolicyOptimizer
from nemo_rl.models.policy.parallel_model import ParallelModel, TensorReader
from nemo_rl.models.policy.policy_checkpoint import TorchState, agree
from nemo_rl.models.weights.adapters import merge
from nemo_rl.models.weights.interfaces import LowRankChange

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

    @functools.cached_property
    def changes(self) -> tuple[LowRankChange, ...]:
        """How the adapters change the model's weights, by the names that `frozen_weights` and `adapters` yield."""
        modules = dict(self._model.module.named_modules())
        result = []
        for name in self._model.parameters():
            layer, is_adapted, _ = name.partition(f"{_BASE}weight")
            if is_adapted:
                module = modules[layer]
                a, b = (f"{layer}{_ADAPTER}{part}.weight" for part in "AB")
                scaling = module.scaling[_NAME.removeprefix(".")]
                result.append(LowRankChange(f"{layer}.weight", a, b, scaling, module.fan_in_fan_out))
        return tuple(result)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the merged weights in the model's order, gathered one at a time. A collective: exhaust it."""
        changes = {change.weight: change for change in self.changes}
        adapters = self._adapter_parameters()
        for name, full in self._frozen():
            if (change := changes.get(name)) is not None:
                a, b = (self._model.full(adapters[part].detach()) for part in (change.a, change.b))
                full = merge(full, a, b, change)
            yield name, full

    def frozen_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights without the adapters, cast as in `BaseWeights`. A collective: exhaust it."""
        changed = {change.weight for change in self.changes}
        for name, full in self._frozen():
            cast = full.to(dtype) if full.is_floating_point() else full
            yield name, full if name in changed and not torch.equal(cast.to(full.dtype), full) else cast

    def adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the adapters in float32, by the names in `changes`. A collective: exhaust it."""
        for name, parameter in self._adapter_parameters().items():
            yield name, self._model.full(parameter.detach())

    def _frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.parameters().items():
            if _ADAPTER not in name:
                yield name.replace(_BASE, "."), self._model.full(parameter.detach())

    def _adapter_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            name.replace(_NAME, ""): parameter
            for name, parameter in self._model.parameters().items()
            if _ADAPTER in name
        }

    def served_weights(self, *, on_all_ranks: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        return self.weights()

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
        tensors = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in self.adapters()}
        config = peft_config(self._config, task_type="CAUSAL_LM", base_model_name_or_path=self._model_name)

        def write(directory: Path) -> None:
            adapter = directory / ADAPTER_DIRECTORY
            adapter.mkdir()
            config.save_pretrained(str(adapter))
            save_file(tensors, adapter / "adapter_model.safetensors")

        return write
