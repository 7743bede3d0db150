"""This process's place in megatron-core's grid of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from nemo_rl.models.policy.megatron.config import MegatronOptions
from nemo_rl.models.policy.process_group import ProcessGroup


@dataclass(frozen=True)
class Grid:
    """Holds this process's groups of ranks; the ranks of a group differ in one coordinate only.

    Attributes:
        world: all ranks.
        data: data-parallel ranks, which hold the same part of the model and process different samples.
        tensor, context, pipeline: torch's groups along the other axes.
        expert: ranks that hold different experts. They differ in their tensor, context or data coordinate.
        expert_data: ranks that hold the same experts.
    """

    world: ProcessGroup
    data: ProcessGroup
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup

    @property
    def stage(self) -> int:
        """Index of this rank's pipeline stage."""
        return self.pipeline.rank()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits and losses."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank belongs to the first of the replicas, which all hold the same weights."""
        return self.data.rank == 0 and self.context.rank() == 0

    def from_last_stage(self, value: Any) -> Any:
        """Return the last stage's (picklable) `value` on all stages. A collective of each pipeline."""
        if self.pipeline.size() == 1:
            return value
        values = [value]
        source = dist.get_global_rank(self.pipeline, self.pipeline.size() - 1)
        dist.broadcast_object_list(values, src=source, group=self.pipeline)
        return values[0]


def make_grid(world: ProcessGroup, options: MegatronOptions) -> Grid:
    """Create the groups of `MegatronOptions.layout` in an initialized `torch.distributed`. A collective."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.tensor_parallel_size,
        pipeline_model_parallel_size=options.pipeline_parallel_size,
        context_parallel_size=options.context_parallel_size,
        expert_model_parallel_size=options.expert_parallel_size,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    # Dropout is off, so the model draws no random numbers and the no-op tracker is enough.
    initialize_rng_tracker(inference_rng_tracker=True)
    data = parallel_state.get_data_parallel_group()
    return Grid(
        world=world,
        data=ProcessGroup(data.rank(), data.size(), world.device, data),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
    )


def leave_grid() -> None:
    """Destroy megatron-core's groups of ranks. Idempotent."""
    parallel_state.destroy_model_parallel()
