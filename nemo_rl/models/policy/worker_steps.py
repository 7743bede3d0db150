"""What policy workers of every backend do alike with a shard of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.interfaces import TrainResult
from nemo_rl.models.policy.microbatching import global_batches, microbatches
from nemo_rl.models.policy.process_group import ProcessGroup

NamedTensors = Iterable[tuple[str, torch.Tensor]]
ResultT = TypeVar("ResultT")
TrainStep = Callable[[BatchedDataDict], tuple[dict[str, float], int]]


@dataclass(frozen=True)
class GlobalCounts:
    """What one optimizer step works on, over all data-parallel ranks.

    Attributes:
        num_tokens, num_samples: float32 scalars on the ranks' device: what the loss is normalized by.
        num_forward_tokens: tokens that go through the model, prompts included.
    """

    num_tokens: torch.Tensor
    num_samples: torch.Tensor
    num_forward_tokens: int


def count_globally(batch: BatchedDataDict, data_ranks: ProcessGroup, device: torch.device) -> GlobalCounts:
    """Count over the shards of all `data_ranks`; a collective."""
    counted = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
    num_tokens, num_samples, forward_tokens = data_ranks.sum(
        [float(counted.sum()), float(batch["sample_mask"].sum()), float(batch["input_lengths"].sum())]
    )
    return GlobalCounts(
        torch.tensor(num_tokens, device=device), torch.tensor(num_samples, device=device), int(forward_tokens)
    )


def train_on_global_batches(shard: BatchedDataDict, local_batch_size: int | None, step: TrainStep) -> TrainResult:
    """Take one optimizer step, `step(batch) -> (metrics, forward tokens)`, per global batch; metrics are averaged.

    A shard with a plan of micro-batches knows its global batches; then `local_batch_size` is not used.
    """
    batches = global_batches(shard, local_batch_size)
    totals: dict[str, float] = {}
    num_tokens = 0
    for batch in batches:
        metrics, tokens = step(batch)
        num_tokens += tokens
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    return TrainResult({name: value / len(batches) for name, value in totals.items()}, len(batches), num_tokens)


def logprobs_by_row(
    shard: BatchedDataDict,
    config: PolicyConfig,
    forward: Callable[[Iterable[BatchedDataDict]], Iterable[torch.Tensor]],
) -> torch.Tensor:
    """Log-probabilities [b, T] float32 on the CPU, in the shard's order.

    Args:
        forward: from micro-batches to their log-probabilities [rows, width], in the same order.
    """
    needed = BatchedDataDict({key: shard[key] for key in ("input_ids", "input_lengths")})
    needed.microbatch_plan = shard.microbatch_plan
    parts = microbatches(needed, config.logprob_batch_size, config.batching.length_multiple)
    result = torch.zeros(needed["input_ids"].shape, dtype=torch.float32)
    row = 0
    for logprobs in forward(parts):
        rows, width = logprobs.shape
        result[row : row + rows, :width] = logprobs.to("cpu")
        row += rows
    return result


def hand_over(tensors: NamedTensors, to: Callable[[NamedTensors], ResultT] | None) -> ResultT | None:
    """Hand over tensors that all ranks gather together, and return what `to` does; None: only take part."""
    if to is not None:
        return to(tensors)
    for _ in tensors:  # takes part in the gathering of every tensor
        pass
    return None
