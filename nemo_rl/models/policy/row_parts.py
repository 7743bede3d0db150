"""Divides the rows of a micro-batch over threads (`models.row_threads`), for small models on CPUs.

::

    forward    rows 0..31  ─►┐ log-probabilities      loss of all rows,      ┌─► backward, rows 0..31  ─►┐ sum of
               rows 32..63 ─►┘ of all rows        ──► its gradient       ──►  └─► backward, rows 32..63 ─►┘ gradients

Sums are in the order of the rows, so results do not depend on which thread is faster. Each thread has its own gradients
of all parameters: 40 MB in float32 for the largest model that counts as small (`cpu_threads.SMALL_MODEL`).
"""

from __future__ import annotations

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.cpu_threads import SMALL_MODEL
from nemo_rl.models.policy.parallel_model import ParallelModel, ReplicatedModel
from nemo_rl.models.row_threads import RowThreads


def threads_for(model: ParallelModel, num_threads: int) -> RowThreads | None:
    """Return threads that divide the rows of a micro-batch; None if each operation is to be divided over threads."""
    size = sum(parameter.numel() for parameter in model.module.parameters())
    # The passes of a sharded model are collectives, in one order on all ranks.
    is_small = model.device.type == "cpu" and isinstance(model, ReplicatedModel) and size <= SMALL_MODEL
    return RowThreads(num_threads) if is_small and num_threads > 1 else None


def row_parts(batch: BatchedDataDict, count: int) -> list[slice]:
    """Return at most `count` slices of rows with about equal numbers of tokens.

    A batch with a `token_mask` is divided between rows with different prompts, if it has enough of them.
    """
    ids, lengths = batch["input_ids"], batch["input_lengths"]
    starts = torch.arange(1, batch.size)
    if "token_mask" in batch:
        first = (batch["token_mask"] > 0).int().argmax(dim=1)
        in_prompt = torch.arange(ids.shape[1]) < first[1:, None]
        same = (first[1:] == first[:-1]) & ((ids[1:] == ids[:-1]) | ~in_prompt).all(dim=1)
        if int((~same).sum()) >= count - 1:
            starts = starts[~same]
    tokens = lengths.cumsum(0)
    bounds = [0]
    for index in range(1, count):
        if not len(starts):
            break
        distance = (tokens[starts - 1] - tokens[-1] * index / count).abs()
        bounds.append(int(starts[distance.argmin()]))
        starts = starts[starts > bounds[-1]]
    return [slice(start, end) for start, end in zip(bounds, [*bounds[1:], batch.size])]
