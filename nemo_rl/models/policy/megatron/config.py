"""The `policy.options` of the Megatron backend. The driver imports this module, which needs no megatron-core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.models.policy.config import DATA_PARALLEL, PolicyConfig, PolicyOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nemo_rl.distributed.named_sharding import NamedSharding

TENSOR_PARALLEL = "tensor_parallel"
CONTEXT_PARALLEL = "context_parallel"
PIPELINE_PARALLEL = "pipeline_parallel"


class MegatronOptions(PolicyOptions):
    """Divides the model, its optimizer and its sequences over the workers."""

    tensor_parallel_size: int = Field(1, ge=1, description="Workers that split the matrices of every layer.")
    pipeline_parallel_size: int = Field(1, ge=1, description="Pipeline stages; each worker holds the layers of one.")
    context_parallel_size: int = Field(1, ge=1, description="Workers that split every sequence.")
    expert_parallel_size: int = Field(
        1, ge=1, description="Workers of a stage that split the experts of every layer. They share no other weights."
    )
    sequence_parallel: bool = Field(
        False, description="Split activations outside matrix products over the tensor-parallel workers, too."
    )
    distributed_optimizer: bool = Field(
        True, description="Split master weights and moments over the data-parallel workers."
    )
    grad_reduce_in_fp32: bool = Field(
        True, description="Accumulate and reduce gradients in float32 for any precision of the weights."
    )
    recompute_num_layers: int = Field(
        1, ge=1, description="Layers recomputed together if policy.activation_checkpointing is on."
    )

    @model_validator(mode="after")
    def _sequence_parallel_needs_tensor_parallel(self) -> MegatronOptions:
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_parallel_size of at least 2")
        return self

    @property
    def workers_per_replica(self) -> int:
        """Number of workers that hold one copy of the model together."""
        return self.tensor_parallel_size * self.context_parallel_size * self.pipeline_parallel_size

    def layout(self, num_workers: int) -> NamedSharding:
        """Place the ranks in megatron-core's order ("tp-cp-ep-dp-pp"): tensor parallel fastest, pipeline slowest.

        Raises:
            ConfigError: the parallel sizes do not divide `num_workers`.
        """
        import numpy as np

        from nemo_rl.distributed.named_sharding import NamedSharding

        replicas, remainder = divmod(num_workers, self.workers_per_replica)
        if remainder or not replicas:
            raise ConfigError(
                f"{num_workers} workers cannot be divided into groups of {self.workers_per_replica}, which is "
                f"policy.options.tensor_parallel_size ({self.tensor_parallel_size}) x context_parallel_size "
                f"({self.context_parallel_size}) x pipeline_parallel_size ({self.pipeline_parallel_size}): "
                "change one of them, or the number of workers (cluster.num_nodes x cluster.gpus_per_node, or "
                "cluster.cpu_workers_per_node)"
            )
        workers_per_stage = num_workers // self.pipeline_parallel_size
        if workers_per_stage % self.expert_parallel_size:
            raise ConfigError(
                f"policy.options.expert_parallel_size={self.expert_parallel_size} does not divide the "
                f"{workers_per_stage} workers of a pipeline stage: change it, or the number of workers"
            )
        ranks = np.arange(num_workers).reshape(
            self.pipeline_parallel_size, replicas, self.context_parallel_size, self.tensor_parallel_size
        )
        return NamedSharding(ranks, [PIPELINE_PARALLEL, DATA_PARALLEL, CONTEXT_PARALLEL, TENSOR_PARALLEL])

    def check(self, policy: PolicyConfig) -> None:
        if policy.sharding != "ddp":
            raise ConfigError(
                f"policy.sharding={policy.sharding} is for the torch backend; policy.backend=megatron shards by "
                "policy.options (tensor_parallel_size, pipeline_parallel_size, distributed_optimizer)"
            )
        if policy.batching.mode == "packed" and self.context_parallel_size > 1:
            raise ConfigError(
                "policy.batching.mode=packed does not support policy.options.context_parallel_size > 1: "
                "set the mode to dynamic or fixed"
            )
        if policy.generation.router_replay and policy.activation_checkpointing and self.pipeline_parallel_size > 1:
            raise ConfigError(
                "policy.generation.router_replay=true does not support policy.activation_checkpointing with "
                f"policy.options.pipeline_parallel_size={self.pipeline_parallel_size}: switch one of the three off"
            )

    def check_model(self, model: PretrainedConfig, policy: PolicyConfig) -> None:
        from nemo_rl.models.policy.megatron.families import find_family  # imports transformers
        from nemo_rl.models.policy.megatron.families.family import unsupported_feature

        name, tensor, stages = policy.model_name, self.tensor_parallel_size, self.pipeline_parallel_size
        problem = find_family(model.model_type).problem(model) or unsupported_feature(model)
        if problem is not None:
            raise ModelError(f"policy.backend=megatron cannot train {name!r}: {problem}. Set policy.backend=torch")
        num_experts = getattr(model, "num_experts", 0)
        self._check_experts(name, num_experts)
        heads, groups = model.num_attention_heads, model.num_key_value_heads
        width = 0 if num_experts else model.intermediate_size  # experts are not split
        if heads % tensor or width % tensor or (groups % tensor and tensor % groups):
            of_mlp = f" and the MLP width {width}" if width else ""
            raise ModelError(
                f"policy.options.tensor_parallel_size={tensor} must divide the {heads} attention heads{of_mlp} of "
                f"{name!r}, and divide its {groups} key-value heads or be a multiple of them"
            )
        if model.num_hidden_layers % stages:
            raise ModelError(
                f"policy.options.pipeline_parallel_size={stages} must divide the {model.num_hidden_layers} layers of "
                f"{name!r}"
            )
        if policy.max_sequence_length > model.max_position_embeddings:
            raise ModelError(
                f"policy.max_sequence_length={policy.max_sequence_length} exceeds the {model.max_position_embeddings} "
                f"positions of the model {name!r}"
            )

    def _check_experts(self, name: str | None, num_experts: int) -> None:
        """Raise `ModelError` unless the experts of a model (0 if it is dense) can be split as configured."""
        size = self.expert_parallel_size
        if size > 1 and not num_experts:
            raise ModelError(f"{name!r} has no experts: set policy.options.expert_parallel_size={size} to 1")
        if num_experts % size:
            raise ModelError(
                f"policy.options.expert_parallel_size={size} must divide the {num_experts} experts of {name!r}"
            )
        if num_experts and self.tensor_parallel_size > 1 and not self.sequence_parallel:
            raise ModelError(
                f"policy.options.tensor_parallel_size={self.tensor_parallel_size} needs "
                f"policy.options.sequence_parallel=true for {name!r}, because it has experts"
            )

    def training_bytes(self, policy: PolicyConfig, num_parameters: int, num_workers: int) -> int:
        """Estimate the bytes in one worker.

        Weights and gradients are split over stages and tensor- or expert-parallel workers, the optimizer as configured.
        """
        # Almost all weights of a model with experts are those of its experts.
        model_shards = max(self.tensor_parallel_size, self.expert_parallel_size) * self.pipeline_parallel_size
        optimizer_shards = model_shards * (num_workers // model_shards if self.distributed_optimizer else 1)
        low = policy.precision == "bfloat16"
        gradient = 4 if self.grad_reduce_in_fp32 or not low else 2
        model, optimizer = (2 + gradient, 12) if low else (4 + gradient, 8)
        return num_parameters * model // model_shards + num_parameters * optimizer // optimizer_shards
