"""Reads a vLLM model's memory back as the Hugging Face parameters that were loaded into it.

vLLM fuses q, k, v and gate, up, pads the vocabulary, and splits matrices over the ranks of a tensor-parallel group. It
loads stacked experts under the names of transformers' modules, and splits the width of each.
Its loaders write into that layout. This module implements the inverse independently of them, so that a digest over
the parameters read back shows whether every weight arrived where the model computes with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.generation.linear import linear_ops
from nemo_rl.models.generation.weight_names import check_weight_names
from nemo_rl.models.weights.digest import WeightDigest, digest_tensors, dtype_name
from nemo_rl.models.weights.interfaces import TensorSpec


@dataclass(frozen=True)
class LocalParameter:
    """This process's part of one Hugging Face parameter.

    Attributes:
        local: A view into a parameter of the engine.
        split_dim: Dimension along which the parameter is split over the ranks. None: every rank holds all of it.
        num_copies: Consecutive ranks that hold the same part: key and value heads, if there are fewer than ranks.
        num_rows: Rows that belong to the parameter; the following rows are padding. None: all rows.
        num_stacked: Matrices that the parameter stacks along `split_dim`. Each of them is split.
    """

    local: torch.Tensor
    split_dim: int | None = None
    num_copies: int = 1
    num_rows: int | None = None
    num_stacked: int = 1

    def full_shape(self, num_ranks: int) -> tuple[int, ...]:
        """Return the shape of the full parameter."""
        shape = list(self.local.shape)
        if self.split_dim is not None:
            shape[self.split_dim] *= num_ranks // self.num_copies
        if self.num_rows is not None:
            shape[0] = self.num_rows
        return tuple(shape)

    def gather(self) -> torch.Tensor:
        """Return the full parameter. Every rank of the group must call this in the same order."""
        tensor = self.local
        group = get_tp_group()
        if self.split_dim is not None and group.world_size > 1:
            parts = group.all_gather(tensor.contiguous(), dim=0).chunk(group.world_size)
            # Each rank takes the copies with its own copy number, so that every copy is checked by some rank.
            copy = group.rank_in_group % self.num_copies
            stacks = [part.chunk(self.num_stacked, self.split_dim) for part in parts[copy :: self.num_copies]]
            tensor = torch.cat([matrix for matrices in zip(*stacks) for matrix in matrices], dim=self.split_dim)
        return tensor if self.num_rows is None else tensor[: self.num_rows]


class LocalParameters:
    """All parameters of a model in this process, by Hugging Face name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = dict(_local_parameters(model))
        self._num_ranks = get_tp_group().world_size

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Raise `WeightSyncError` unless the specs are exactly the parameters, with their shapes and dtypes."""
        self.check_names([spec.name for spec in specs])
        for spec in specs:
            self._check_tensor(spec.name, spec.shape, spec.dtype)

    def check_names(self, names: Collection[str]) -> None:
        """Raise `WeightSyncError` unless the names are exactly the parameters' names."""
        check_weight_names(self._parameters, names)

    def checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors after checking each one. Raises `WeightSyncError` for a tensor of another model."""
        for name, tensor in tensors:
            self._check_tensor(name, tuple(tensor.shape), dtype_name(tensor.dtype))
            yield name, tensor

    def contiguous(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the memory of the parameters in the model as it is now; empty if ranks share the parameters.

        A parameter of which this process holds no contiguous memory is missing.
        """
        if self._num_ranks > 1:
            return {}
        parameters = {name: parameter.gather() for name, parameter in _local_parameters(model)}
        return {name: tensor for name, tensor in parameters.items() if tensor.is_contiguous()}

    def gather(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield full parameters from the engine's memory. Every rank must ask for the same names."""
        return ((name, self._parameters[name].gather()) for name in names)

    def _check_tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        parameter = self._parameters.get(name)
        if parameter is None:
            raise WeightSyncError(f"the published weights are not this model's: unknown {name}")
        expected = (parameter.full_shape(self._num_ranks), dtype_name(parameter.local.dtype))
        if (shape, dtype) != expected:
            raise WeightSyncError(f"{name} was published as {dtype} {shape}, expected {expected[1]} {expected[0]}")


class ReadBack:
    """Reads loaded weights back from the engine's memory, bucket by bucket, and computes their digest.

    Args:
        parameters: The engine's parameters.
        on_gpu: As for `WeightDigest`.
    """

    def __init__(self, parameters: LocalParameters, *, on_gpu: bool) -> None:
        self._parameters = parameters
        self._on_gpu = on_gpu
        self._digest = WeightDigest(on_gpu=on_gpu)
        self._names: list[str] = []

    def read(self, specs: Sequence[TensorSpec]) -> None:
        """Read the parameters of a bucket that has been loaded."""
        names = [spec.name for spec in specs]
        for name, tensor in self._parameters.gather(names):
            self._digest.add_tensor(name, tensor)
        self._names += names

    def digest(self, *, again: bool) -> str:
        """Return the digest of all parameters, in the order in which they arrived.

        Args:
            again: Read all parameters again now, and return the digest of that.

        Raises:
            WeightSyncError: Some parameters have not arrived.
        """
        digest = self._digest.hexdigest()
        self._parameters.check_names(self._names)
        return digest_tensors(self._parameters.gather(self._names), on_gpu=self._on_gpu) if again else digest


def keep_plain_weights() -> None:
    """Let vLLM's CPU build multiply with the parameters themselves. Call this before a model is made.

    By default vLLM packs the parameters into oneDNN buffers and frees them: a later load would then have no effect, and
    no digest could be computed.
    """
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _use_plain_weight


def _use_plain_weight(layer: Any, remove_weight: bool) -> None:
    weight = layer.weight
    is_float32 = weight.dtype == torch.float32
    layer.cpu_linear = linear_ops(weight.device, weight.dtype).linear if is_float32 else torch.nn.functional.linear


def _local_parameters(model: torch.nn.Module) -> Iterator[tuple[str, LocalParameter]]:
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    seen: set[int] = set()  # tied parameters count once, under their first name, as in Hugging Face's models
    for module_name, module in model.named_modules():
        parent, _, local_name = module_name.rpartition(".")
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            data = parameter.data
            if isinstance(module, RoutedExperts):
                # Its parent is a runner, which has the name of Hugging Face's module.
                yield _experts(parent, kind, data)
            elif isinstance(module, QKVParallelLinear | MergedColumnParallelLinear):
                names = [f"{parent}.{name}.{kind}" for name in packed[local_name]]
                yield from zip(names, _unfused(module, data), strict=True)
            else:
                yield f"{module_name}.{kind}", _unsplit(module, kind, data)


def _unfused(module: Any, data: torch.Tensor) -> Iterable[LocalParameter]:
    if isinstance(module, QKVParallelLinear):
        sizes = [module.num_heads * module.head_size, module.num_kv_heads * module.head_size]
        sizes.append(module.num_kv_heads * module.v_head_size)
        copies = [1, module.num_kv_head_replicas, module.num_kv_head_replicas]
    else:
        sizes = [size // module.tp_size for size in module.output_sizes]
        copies = [1] * len(sizes)
    return [LocalParameter(part, 0, count) for part, count in zip(data.split(sizes), copies, strict=True)]


def _experts(module_name: str, kind: str, data: torch.Tensor) -> tuple[str, LocalParameter]:
    if kind == "w13_weight":
        return f"{module_name}.gate_up_proj", LocalParameter(data, 1, num_stacked=2)
    if kind == "w2_weight":
        return f"{module_name}.down_proj", LocalParameter(data, 2)
    return f"{module_name}.{kind}", LocalParameter(data)  # such as a bias


def _unsplit(module: torch.nn.Module, kind: str, data: torch.Tensor) -> LocalParameter:
    if isinstance(module, VocabParallelEmbedding):
        return LocalParameter(data, 0, num_rows=module.org_vocab_size)
    if isinstance(module, RowParallelLinear) and kind == "weight":
        return LocalParameter(data, 1)
    if isinstance(module, ColumnParallelLinear):
        return LocalParameter(data, 0)
    return LocalParameter(data)
