"""Reductions of counts and metrics over the micro-batches and the ranks of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy.process_group import ProcessGroup


@dataclass(frozen=True)
class GlobalCounts:
    """Counts of one optimizer step over all data-parallel ranks.

    Attributes:
        num_tokens, num_samples: float32 scalars on the device; the loss is normalized by them.
        num_forward_tokens: tokens of the forward passes, prompts included.
    """

    num_tokens: torch.Tensor
    num_samples: torch.Tensor
    num_forward_tokens: int

    @classmethod
    def over(cls, batch: BatchedDataDict, data_ranks: ProcessGroup) -> GlobalCounts:
        """Count over the batches of all `data_ranks`. A collective."""
        counted = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
        num_tokens, num_samples, forward_tokens = data_ranks.sum(
            [float(counted.sum()), float(batch["sample_mask"].sum()), float(batch["input_lengths"].sum())]
        )
        device = data_ranks.device
        return cls(
            torch.tensor(num_tokens, device=device), torch.tensor(num_samples, device=device), int(forward_tokens)
        )


class MetricSums:
    """Sums scalar metrics by name; a name that ends in `_max` or `_min` takes the maximum or minimum instead.

    Values stay on their device until `reduced`, so that the CPU does not wait for the GPU after every micro-batch.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = {}

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Add the scalars of one micro-batch."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(torch.as_tensor(value).detach().reshape(()))

    def reduced(self, group: ProcessGroup) -> dict[str, float]:
        """Reduce over all micro-batches and ranks. A collective; all ranks must have added the same names."""
        names = sorted(self._values)
        summed = [name for name in names if not name.endswith(("_max", "_min"))]
        extremes = [name for name in names if name.endswith(("_max", "_min"))]
        columns = {name: torch.stack(values).to(torch.float64).cpu() for name, values in self._values.items()}
        sums = group.sum([float(columns[name].sum()) for name in summed])
        # A minimum is the negative of a maximum, so one collective reduces both.
        signs = [1.0 if name.endswith("_max") else -1.0 for name in extremes]
        largest = group.max([float((sign * columns[name]).max()) for name, sign in zip(extremes, signs)])
        return dict(zip(summed, sums)) | {n: sign * value for n, sign, value in zip(extremes, signs, largest)}
