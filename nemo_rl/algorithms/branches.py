"""Joins the transcripts of a rollout into one training batch.

An agent may leave several transcripts in one episode, its branches. The episode has one reward and one place in its
group; all its transcripts are trained on::

    rows:  the samples' first transcripts | their branches | padding     (once for each optimizer step)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict

if TYPE_CHECKING:
    from nemo_rl.algorithms.rollouts import Rollout

# What belongs to a sample, not to a transcript.
_OF_SAMPLES = ("group", "rewards", "sample_mask", "turn_rewards", "num_turns")


@dataclass(frozen=True)
class TrainingRows:
    """Holds the R rows of a training batch.

    Attributes:
        batch: the layout of `models.policy.interfaces`.
        samples: [R] int64, the sample of the rollout that each row belongs to.
        turn_index: [R, T] int64, see `Rollout.batch`; None if the environment has no turns.
        num_parts: equal parts of the batch, one for each optimizer step.
    """

    batch: BatchedDataDict
    samples: torch.Tensor
    turn_index: torch.Tensor | None
    num_parts: int


def training_rows(rollout: Rollout, *, num_parts: int, multiple_of: int, pad_token_id: int) -> TrainingRows:
    """Return the training batch of a rollout.

    Args:
        rollout: a rollout of B samples, which `num_parts` divides.
        num_parts: the samples are divided, in their order, into so many equal parts, and the rows likewise: the rows of
            a part are the transcripts of its samples.
        multiple_of: a part with branches is padded to a multiple of this number. Padding does not count.
        pad_token_id: fills rows.
    """
    size = rollout.batch.size
    batch = BatchedDataDict({key: value for key, value in rollout.batch.items() if key not in _OF_SAMPLES})
    samples = torch.arange(size)
    counts = torch.ones(size)
    if rollout.branches is not None:
        others = BatchedDataDict({key: value for key, value in rollout.branches.items() if key != "sample"})
        batch = BatchedDataDict.from_batches([batch, others], pad_value_dict={"input_ids": pad_token_id})
        samples = torch.cat([samples, rollout.branches["sample"]])
        part_of = samples // (size // num_parts)
        parts = [(part_of == part).nonzero().flatten() for part in range(num_parts)]
        part_size = -(-max(map(len, parts)) // multiple_of) * multiple_of
        # Padding repeats a row.
        order = torch.cat([torch.cat([part, part[:1].expand(part_size - len(part))]) for part in parts])
        counts = torch.cat([(torch.arange(part_size) < len(part)).float() for part in parts])
        batch, samples = batch.select_indices(order), samples[order]
        batch["token_mask"] = batch["token_mask"] * counts[:, None]
    batch["sample_mask"] = rollout.batch["sample_mask"][samples] * counts
    batch["group"], batch["rewards"] = rollout.batch["group"][samples], rollout.rewards[samples]
    return TrainingRows(batch, samples, batch.pop("turn_index", None), num_parts)
