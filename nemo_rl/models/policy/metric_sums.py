"""Metrics of a loss, added up over micro-batches and ranks."""

from __future__ import annotations

import torch

from nemo_rl.models.policy.process_group import ProcessGroup


class MetricSums:
    """Adds scalars up by name; those whose name ends in `_max` or `_min` are reduced so instead.

    Values stay on their device until `reduced`, so that the CPU does not wait for the GPU at every micro-batch.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = {}

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """The scalars of one micro-batch."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(torch.as_tensor(value).detach().reshape(()))

    def reduced(self, group: ProcessGroup) -> dict[str, float]:
        """Over all micro-batches and all ranks, which must have added the same names. A collective."""
        names = sorted(self._values)
        summed = [name for name in names if not name.endswith(("_max", "_min"))]
        extremes = [name for name in names if name.endswith(("_max", "_min"))]
        columns = {name: torch.stack(values).to(torch.float64).cpu() for name, values in self._values.items()}
        sums = group.sum([float(columns[name].sum()) for name in summed])
        # A minimum is the negative of a maximum: one collective for both.
        signs = [1.0 if name.endswith("_max") else -1.0 for name in extremes]
        largest = group.max([float((sign * columns[name]).max()) for name, sign in zip(extremes, signs)])
        return dict(zip(summed, sums)) | {n: sign * value for n, sign, value in zip(extremes, signs, largest)}
