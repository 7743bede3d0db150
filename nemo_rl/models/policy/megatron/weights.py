"""Converts weights and the optimizer's moments between the ranks' shards and full Hugging Face tensors.

::

    gather   stage's shards ──all-gather over parallel ranks──► full parameter ──send──► rank 0 ──► tensors
    scatter  rank 0: tensors ──► all shards of one parameter ──broadcast──► every rank keeps its shard

Both process one Megatron parameter at a time, so that no rank holds more than one full parameter. They work for any
parallel sizes, so tensors gathered under one layout can be scattered under another. Experts are gathered over
expert-parallel ranks, all other parameters over tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from nemo_rl.errors import ModelError
from nemo_rl.models.policy.megatron.families.family import Family
from nemo_rl.models.policy.megatron.parallel import Grid
from nemo_rl.models.policy.megatron.sharding_rules import ModelShape, Rule

Read = Callable[[nn.Parameter], torch.Tensor]
Write = Callable[[nn.Parameter, torch.Tensor], object]

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class _Unit:
    """One Megatron parameter of the full model.

    Attributes:
        rule: converts Hugging Face tensors to this parameter.
        names, shapes: names and shapes of those tensors.
        stage: the pipeline stage that it is gathered from.
    """

    rule: Rule
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    stage: int


class WeightExchange:
    """Gathers and scatters tensors between a model's shards and Hugging Face names.

    Args:
        model: this rank's part of the model. The constructor marks its parameters as split over tensor-parallel ranks
            or not, which megatron-core's gradient norm relies on.
        hf: configuration of the model.
        family: tables of the model's family.
        shapes: names and shapes of the Hugging Face parameters, in the model's order, tied ones once.
        grid: this rank's place.

    Raises:
        ModelError: the family's tables and the model do not have the same parameters.
    """

    def __init__(
        self, model: nn.Module, hf: PreTrainedConfig, family: Family, shapes: dict[str, torch.Size], grid: Grid
    ) -> None:
        self._grid = grid
        self._shape = ModelShape(hf.num_key_value_heads, grid.tensor.size(), grid.expert.size())
        self._shapes = shapes
        layers_per_stage = hf.num_hidden_layers // grid.pipeline.size()
        self._units = _units(hf, family, shapes, layers_per_stage, grid.pipeline.size())
        self._unit_of = {name: unit for unit, content in self._units.items() for name in content.names}
        if self._unit_of.keys() != shapes.keys():
            different = sorted(self._unit_of.keys() ^ shapes.keys())
            raise ModelError(
                f"the tables of the family {hf.model_type!r} do not fit this model: {len(different)} parameters are in "
                f"only one of the two, such as {different[0]}"
            )
        self._local = _local_parameters(model, layers_per_stage * grid.stage)
        unknown = sorted(self._local.keys() - self._units.keys())
        if unknown:
            raise ModelError(f"the tables of the family {hf.model_type!r} lack Megatron's {unknown[0]}")
        for name, parameter in self._local.items():
            parameter.tensor_model_parallel = self._units[name].rule.split  # type: ignore[attr-defined]

    def gather(
        self, read: Read, *, dtype: torch.dtype, from_all_replicas: bool, on_all_ranks: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield Hugging Face names and full tensors on rank 0, in the model's order; nothing on other ranks.

        A collective: exhaust it.

        Args:
            read: returns a parameter's weight or moment on a rank that holds the parameter.
            dtype: dtype that `read` returns on all ranks.
            from_all_replicas: `read` is a collective of data-parallel ranks. Otherwise only the first replica takes
                part.
            on_all_ranks: yield all tensors on every rank.
        """
        ready: dict[str, torch.Tensor] = {}
        for name in self._shapes:
            if name not in ready:
                unit_name = self._unit_of[name]
                unit = self._units[unit_name]
                takes_part = on_all_ranks or self._is_in_first_replica(unit)
                if not takes_part and not from_all_replicas:
                    continue
                local = read(self._local[unit_name]) if self._holds(unit_name) else None
                shards = self._collect(unit, local, dtype, on_all_ranks=on_all_ranks) if takes_part else None
                if shards is None:
                    tensors = [torch.empty(0)] * len(unit.names)
                else:
                    tensors = unit.rule.tensors(shards, unit.shapes, self._shape)
                ready.update(zip(unit.names, tensors))
            tensor = ready.pop(name)
            if on_all_ranks or self._grid.world.rank == 0:
                yield name, tensor

    def scatter(self, read: Callable[[str], torch.Tensor] | None, write: Write) -> None:
        """Write every rank's float32 shards. A collective.

        Args:
            read: returns a Hugging Face tensor by name on rank 0; None on other ranks.
            write: writes a parameter's shard.
        """
        device = self._grid.world.device
        for name, unit in self._units.items():
            if read is None:
                buffer = torch.empty(self._shards_shape(unit), device=device)
            else:
                tensors = [read(part).to(device, torch.float32) for part in unit.names]
                buffer = unit.rule.shards(tensors, self._shape).contiguous()
            if self._grid.world.world_size > 1:
                dist.broadcast(buffer, src=0)
            if name in self._local:
                write(self._local[name], buffer[self._ranks(unit).rank() if unit.rule.split else 0])

    def _ranks(self, unit: _Unit) -> dist.ProcessGroup:
        """The ranks that a split parameter is split over."""
        return self._grid.expert if unit.rule.of_experts else self._grid.tensor

    def _is_in_first_replica(self, unit: _Unit) -> bool:
        return self._grid.expert_data.rank() == 0 if unit.rule.of_experts else self._grid.is_first_replica

    def _holds(self, unit_name: str) -> bool:
        """Whether the parameter is gathered from this rank's stage."""
        return unit_name in self._local and self._units[unit_name].stage == self._grid.stage

    def _collect(
        self, unit: _Unit, local: torch.Tensor | None, dtype: torch.dtype, *, on_all_ranks: bool
    ) -> torch.Tensor | None:
        """Return all shards of a parameter on rank 0, None elsewhere. A collective of the first replica's ranks.

        With `on_all_ranks`, all ranks take part and return the shards.
        """
        shards = None
        if local is not None:
            shards = local[None] if not unit.rule.split else _all_shards(local, self._ranks(unit))
        if on_all_ranks:
            return self._on_all_stages(unit, shards, dtype)
        # The first rank of every stage takes part in gathering all of its parameters.
        if unit.stage > 0 and self._grid.is_first_replica and self._grid.tensor.rank() == 0:
            first = dist.get_global_rank(self._grid.pipeline, 0)
            owner = dist.get_global_rank(self._grid.pipeline, unit.stage)
            if shards is not None:
                dist.send(shards.contiguous(), dst=first, group=self._grid.pipeline)
            elif self._grid.stage == 0:
                shards = torch.empty(self._shards_shape(unit), dtype=dtype, device=self._grid.world.device)
                dist.recv(shards, src=owner, group=self._grid.pipeline)
        return shards if self._grid.world.rank == 0 else None

    def _on_all_stages(self, unit: _Unit, shards: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Broadcast the shards of the parameter's stage to all stages."""
        if shards is None:
            shards = torch.empty(self._shards_shape(unit), dtype=dtype, device=self._grid.world.device)
        if self._grid.pipeline.size() > 1:
            shards = shards.contiguous()
            owner = dist.get_global_rank(self._grid.pipeline, unit.stage)
            dist.broadcast(shards, src=owner, group=self._grid.pipeline)
        return shards

    def _shards_shape(self, unit: _Unit) -> torch.Size:
        return unit.rule.shards([torch.empty(shape, device="meta") for shape in unit.shapes], self._shape).shape


def _units(
    hf: PreTrainedConfig, family: Family, shapes: dict[str, torch.Size], layers_per_stage: int, num_stages: int
) -> dict[str, _Unit]:
    """Return every parameter of the full model by Megatron's name, with the layer's number in the full model."""

    def unit(rule: Rule, prefix: str, stage: int) -> _Unit:
        names = tuple(f"{prefix}{name}" for name in rule.names)
        return _Unit(rule, names, tuple(shapes.get(name, torch.Size()) for name in names), stage)

    units = {
        name: unit(rule, "", 0 if name == _EMBEDDING else num_stages - 1)
        for name, rule in family.model.items()
        if not (name == _OUTPUT and hf.tie_word_embeddings)
    }
    for layer in range(hf.num_hidden_layers):
        for name, rule in family.layer.items():
            units[f"decoder.layers.{layer}.{name}"] = unit(rule, f"model.layers.{layer}.", layer // layers_per_stage)
    return units


def _all_shards(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() == 1:
        return local[None]
    parts = [torch.empty_like(local, requires_grad=False) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.stack(parts)


def _local_parameters(model: nn.Module, first_layer: int) -> dict[str, nn.Parameter]:
    """Return this rank's parameters by their names in `_units`.

    The last stage's copy of a tied embedding has the embedding's name.
    """
    parameters = {}
    for name, parameter in model.named_parameters():
        layer = _LAYER.match(name)
        if layer:
            name = f"decoder.layers.{int(layer[1]) + first_layer}.{name[layer.end() :]}"
        elif name == _OUTPUT and getattr(parameter, "shared_embedding", False):
            name = _EMBEDDING
        parameters[name] = parameter
    return parameters
