"""A vLLM model's own memory, seen as the Hugging Face parameters that were loaded into it.

vLLM fuses q, k, v and gate, up, pads the vocabulary, and splits matrices over the ranks of a tensor-parallel group.
Its loaders know how to write into that; here is the way back, written down independently of them, so that a digest
over what is read back tells whether everything arrived where it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.generation.linear import linear_ops
from nemo_rl.models.weights.digest import WeightDigest, digest_tensors, dtype_name
from nemo_rl.models.weights.interfaces import TensorSpec
from nemo_rl.utils.names import abbreviated


@dataclass(frozen=True)
class OwnTensor:
    """This process's part of one Hugging Face parameter.

    Attributes:
        local: a view into a parameter of the engine.
        split_dim: dimension along which the ranks' parts lie one after the other; None: every rank has all of it.
        num_copies: consecutive ranks that hold the same part: of key and value heads, where there are fewer than ranks.
        num_rows: how many rows count; what follows is padding. None: all.
    """

    local: torch.Tensor
    split_dim: int | None = None
    num_copies: int = 1
    num_rows: int | None = None

    def shape(self, num_ranks: int) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        shape = list(self.local.shape)
        if self.split_dim is not None:
            shape[self.split_dim] *= num_ranks // self.num_copies
        if self.num_rows is not None:
            shape[0] = self.num_rows
        return tuple(shape)

    def whole(self) -> torch.Tensor:
        """The parameter, with the other ranks' parts; every rank of the group has to call this in the same order."""
        tensor = self.local
        group = get_tp_group()
        if self.split_dim is not None and group.world_size > 1:
            parts = group.all_gather(tensor.contiguous(), dim=0).chunk(group.world_size)
            # Of equal parts each rank takes those that answer to its own: so every copy is looked at by somebody.
            own = group.rank_in_group % self.num_copies
            tensor = torch.cat(parts[own :: self.num_copies], dim=self.split_dim)
        return tensor if self.num_rows is None else tensor[: self.num_rows]


class OwnTensors:
    """All parameters of a model in this process, by Hugging Face name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = dict(_own_tensors(model))
        self._num_ranks = get_tp_group().world_size

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Raise `WeightSyncError` unless these are exactly the parameters, with their shapes and dtypes."""
        self.check_names([spec.name for spec in specs])
        for spec in specs:
            self._check_tensor(spec.name, spec.shape, spec.dtype)

    def check_names(self, names: Collection[str]) -> None:
        """Raise `WeightSyncError` unless these are the names of exactly the parameters."""
        missing = [name for name in self._tensors if name not in names]
        unknown = [name for name in names if name not in self._tensors]
        if missing or unknown:
            raise WeightSyncError(
                f"the published weights are not this model's: missing {abbreviated(missing)}, "
                f"unknown {abbreviated(unknown)}"
            )

    def checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, each looked at before it is handed on. Raises `WeightSyncError` for one that is not ours."""
        for name, tensor in tensors:
            self._check_tensor(name, tuple(tensor.shape), dtype_name(tensor.dtype))
            yield name, tensor

    def whole(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters as they lie in the engine's memory now, whole; every rank asks for the same ones."""
        return ((name, self._tensors[name].whole()) for name in names)

    def _check_tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        own = self._tensors.get(name)
        if own is None:
            raise WeightSyncError(f"the published weights are not this model's: unknown {name}")
        expected = (own.shape(self._num_ranks), dtype_name(own.local.dtype))
        if (shape, dtype) != expected:
            raise WeightSyncError(f"{name} was published as {dtype} {shape}, expected {expected[1]} {expected[0]}")


class ReadBack:
    """Reads back what an update has loaded, bucket by bucket.

    Args:
        own: what it is loaded into.
        on_gpu: as of `WeightDigest`.
    """

    def __init__(self, own: OwnTensors, *, on_gpu: bool) -> None:
        self._own = own
        self._on_gpu = on_gpu
        self._digest = WeightDigest(on_gpu=on_gpu)
        self._names: list[str] = []

    def read(self, specs: Sequence[TensorSpec]) -> None:
        """Read the parameters of a bucket that has been loaded."""
        names = [spec.name for spec in specs]
        for name, tensor in self._own.whole(names):
            self._digest.add_tensor(name, tensor)
        self._names += names

    def digest(self, *, as_a_whole: bool) -> str:
        """Of all parameters, in the order in which they came.

        Args:
            as_a_whole: read all of them once more, now.

        Raises:
            WeightSyncError: not all have come.
        """
        digest = self._digest.hexdigest()
        self._own.check_names(self._names)
        return digest_tensors(self._own.whole(self._names), on_gpu=self._on_gpu) if as_a_whole else digest


def keep_plain_weights() -> None:
    """Let vLLM's CPU build multiply with the parameters themselves; call it before a model is made.

    By default it packs them into buffers of oneDNN's and lets go of the parameters, so that a later load would change
    nothing and a digest would have nothing to look at.
    """
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _use_plain_weight


def _use_plain_weight(layer: Any, remove_weight: bool) -> None:
    weight = layer.weight
    is_float32 = weight.dtype == torch.float32
    layer.cpu_linear = linear_ops(weight.device, weight.dtype).linear if is_float32 else torch.nn.functional.linear


def _own_tensors(model: torch.nn.Module) -> Iterator[tuple[str, OwnTensor]]:
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    seen: set[int] = set()  # tied parameters count once, under their first name, as in Hugging Face's models
    for module_name, module in model.named_modules():
        owner, _, own_name = module_name.rpartition(".")
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            data = parameter.data
            if isinstance(module, QKVParallelLinear | MergedColumnParallelLinear):
                names = [f"{owner}.{name}.{kind}" for name in packed[own_name]]
                yield from zip(names, _unfused(module, data), strict=True)
            else:
                yield f"{module_name}.{kind}", _unsplit(module, kind, data)


def _unfused(module: Any, data: torch.Tensor) -> Iterable[OwnTensor]:
    if isinstance(module, QKVParallelLinear):
        sizes = [module.num_heads * module.head_size, module.num_kv_heads * module.head_size]
        sizes.append(module.num_kv_heads * module.v_head_size)
        copies = [1, module.num_kv_head_replicas, module.num_kv_head_replicas]
    else:
        sizes = [size // module.tp_size for size in module.output_sizes]
        copies = [1] * len(sizes)
    return [OwnTensor(part, 0, count) for part, count in zip(data.split(sizes), copies, strict=True)]


def _unsplit(module: torch.nn.Module, kind: str, data: torch.Tensor) -> OwnTensor:
    if isinstance(module, VocabParallelEmbedding):
        return OwnTensor(data, 0, num_rows=module.org_vocab_size)
    if isinstance(module, RowParallelLinear) and kind == "weight":
        return OwnTensor(data, 1)
    if isinstance(module, ColumnParallelLinear):
        return OwnTensor(data, 0)
    return OwnTensor(data)
