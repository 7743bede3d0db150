"""A Hugging Face model over the ranks of a process group: replicated, or sharded with FSDP2.

Both have the same interface: the module to call, a context for its precision, the reduction of gradients, and access to
full tensors one by one. Gradients are summed over ranks, never averaged, because losses divide by global counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig, PreTrainedModel

from nemo_rl.errors import ModelError
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.cpu_kernels import use_cpu_kernels, use_onednn_linears
from nemo_rl.models.policy.hf_loading import (
    as_reward_model,
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    padding_token,
)
from nemo_rl.models.policy.process_group import ProcessGroup

# Gradients are reduced in buckets of at most this many elements (256 MiB of float32).
REDUCE_BUCKET_ELEMENTS = 2**26

TensorReader = Callable[[str], torch.Tensor]


class ParallelModel(ABC):
    """Holds one model over all ranks of a process group.

    Attributes:
        module: the model to call. Under FSDP every forward and backward pass is a collective.
        config: configuration of the Hugging Face model.
        group: the ranks.
        bfloat16: whether matrices are multiplied in bfloat16 instead of float32.
    """

    def __init__(self, module: PreTrainedModel, group: ProcessGroup, *, bfloat16: bool) -> None:
        self.module = module
        self.config: PreTrainedConfig = module.config
        self.bfloat16 = bfloat16
        self.group = group

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return Hugging Face names and parameters in the model's order, tied ones once. Sharded ones are DTensors."""
        return dict(self.module.named_parameters())

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.group.device

    @abstractmethod
    def precision(self) -> AbstractContextManager[Any]:
        """Return the context for a forward pass."""

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Sum every gradient over all ranks. A collective."""

    @abstractmethod
    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather a (possibly sharded) parameter or optimizer state. A collective."""

    @abstractmethod
    def copy_from_rank_0(self, target: torch.Tensor, source: torch.Tensor | None) -> None:
        """Fill a (possibly sharded) tensor from the full `source` on rank 0 (None on other ranks). A collective."""

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and full parameters in the model's order, gathered one at a time. A collective: exhaust it."""
        for name, parameter in self.parameters().items():
            yield name, self.full(parameter.detach())

    def load_full_tensors(self, read: TensorReader | None) -> None:
        """Fill the parameters from `read(name)`, which returns the full value on rank 0. A collective."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                self.copy_from_rank_0(parameter, None if read is None else read(name))


class ReplicatedModel(ParallelModel):
    """Replicates the model on every rank (data parallel).

    bfloat16 uses autocast: weights, gradients and the residual stream are float32, matrix products bfloat16.
    """

    def precision(self) -> AbstractContextManager[Any]:
        if not self.bfloat16:
            return nullcontext()
        return torch.autocast(self.group.device.type, dtype=torch.bfloat16)

    def reduce_gradients(self) -> None:
        if self.group.world_size == 1:
            return
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # unused on this rank, but possibly used on others
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([cast(torch.Tensor, parameter.grad) for parameter in trained]):
            flat = torch.cat([gradient.view(-1) for gradient in bucket])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket)])

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def copy_from_rank_0(self, target: torch.Tensor, source: torch.Tensor | None) -> None:
        if source is not None:
            target.copy_(source)
        if self.group.world_size > 1:
            dist.broadcast(target.detach(), src=0)


class ShardedModel(ParallelModel):
    """Shards parameters, gradients and optimizer state over the ranks (FSDP2); layers are gathered when they run.

    bfloat16: layers are gathered and run in bfloat16; shards, the reduction of gradients and the optimizer are float32.
    """

    def __init__(self, module: PreTrainedModel, group: ProcessGroup, *, bfloat16: bool) -> None:
        super().__init__(module, group, bfloat16=bfloat16)
        self._mesh = init_device_mesh(group.device.type, (group.world_size,), mesh_dim_names=("data_parallel",))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
        _shard(module, self._mesh, policy)

    def precision(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def parameters(self) -> dict[str, nn.Parameter]:
        # After a forward pass without a backward pass the outermost group is still gathered.
        cast(FSDPModule, self.module).reshard()
        return super().parameters()

    def reduce_gradients(self) -> None:
        """Do nothing: FSDP2 sums gradients in the backward pass."""

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def copy_from_rank_0(self, target: torch.Tensor, source: torch.Tensor | None) -> None:
        if not isinstance(target, DTensor):
            if source is not None:
                target.copy_(source)
            dist.broadcast(target, src=0)
            return
        if source is None:
            full = torch.empty(target.shape, dtype=target.dtype, device=self.group.device)
        else:
            full = source.to(self.group.device, target.dtype)
        target.copy_(distribute_tensor(full, self._mesh, target.placements))


def load_parallel_model(policy: PolicyConfig, group: ProcessGroup, *, trained: bool) -> ParallelModel:
    """Load `policy.model_name` with its initial weights over all ranks of `group`. A collective.

    Args:
        policy: the policy section.
        group: the ranks.
        trained: enable gradients (and activation checkpointing if configured); else freeze the model.

    Raises:
        ModelError: the model cannot be loaded or does not fit the configuration. If the model is sharded, unreadable
            weights raise on rank 0 only; the other ranks wait for it and end with the group.
    """
    config = load_config(policy.model_name, policy.attn_implementation)
    if policy.is_reward_model:
        config = as_reward_model(config, padding_token(load_tokenizer(policy.tokenizer_name or policy.model_name)))
    _check_length(policy, config)
    if policy.sharding == "fsdp":
        return _load_sharded(policy, config, group, trained=trained)
    module = load_model(policy.model_name, config)
    _prepare(module, policy, trained=trained)
    add = _adapters(policy, trained=trained)
    add(module)
    module.to(group.device)  # type: ignore[arg-type]
    _use_cpu_kernels(module, policy, group)
    return ReplicatedModel(module, group, bfloat16=policy.precision == "bfloat16")


def _load_sharded(
    policy: PolicyConfig, config: PreTrainedConfig, group: ProcessGroup, *, trained: bool
) -> ShardedModel:
    """Load the weights into rank 0's main memory. A device holds its shards and one full tensor at a time."""
    loaded = load_model(policy.model_name, config) if group.rank == 0 else None
    module = empty_model(config)
    if loaded is not None and loaded.can_generate():
        module.generation_config = loaded.generation_config
    _prepare(module, policy, trained=trained)
    add = _adapters(policy, trained=trained)
    add(module)
    if loaded is not None:
        add(loaded)
    model = ShardedModel(module, group, bfloat16=policy.precision == "bfloat16")
    module.to_empty(device=group.device)
    module.tie_weights()  # `to_empty` has allocated tied parameters separately
    _use_cpu_kernels(module, policy, group)
    parameters = {} if loaded is None else {name: value.detach() for name, value in loaded.named_parameters()}
    model.load_full_tensors(None if loaded is None else parameters.__getitem__)
    buffers = {} if loaded is None else dict(loaded.named_buffers())
    for name, buffer in module.named_buffers():
        model.copy_from_rank_0(buffer, buffers.get(name))
    return model


def _adapters(policy: PolicyConfig, *, trained: bool) -> Callable[[PreTrainedModel], None]:
    """Return what adds the adapters of `policy.lora` to a model, and does nothing if there are none."""
    lora = policy.lora
    if lora is None or not trained:
        return lambda module: None
    from nemo_rl.models.policy.lora import add_adapters

    return lambda module: add_adapters(module, lora)


def _use_cpu_kernels(module: PreTrainedModel, policy: PolicyConfig, group: ProcessGroup) -> None:
    if group.device.type == "cpu" and policy.precision == "float32":
        use_onednn_linears(module)
        use_cpu_kernels(module)


def _prepare(module: PreTrainedModel, policy: PolicyConfig, *, trained: bool) -> None:
    module.requires_grad_(trained)
    module.train(trained)  # dropout is 0; activation checkpointing runs in training mode only
    if trained and policy.activation_checkpointing:
        _checkpoint_activations(module)


def _shard(module: PreTrainedModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    classes = set(module._no_split_modules or ())
    layers = [part for part in module.modules() if type(part).__name__ in classes]
    if not layers:
        raise ModelError(
            f"{type(module).__name__} does not declare which of its layers can be sharded (_no_split_modules): "
            "set policy.sharding=ddp"
        )
    for part in (*layers, module):
        sharded = fully_shard(part, mesh=mesh, mp_policy=policy)
        # A plain sum. Without the second line FSDP would request a premultiplied sum, which gloo does not support.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def _checkpoint_activations(module: PreTrainedModel) -> None:
    if not module.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(module).__name__} cannot recompute activations: set policy.activation_checkpointing=false"
        )
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _check_length(policy: PolicyConfig, config: PreTrainedConfig) -> None:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and policy.max_sequence_length > longest:
        raise ModelError(
            f"policy.max_sequence_length={policy.max_sequence_length} exceeds the {longest} positions of the model "
            f"{policy.model_name!r}"
        )


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > REDUCE_BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
