"""What the training loops of all algorithms share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from nemo_rl.errors import CheckpointError, ConfigError, sentence
from nemo_rl.utils.names import did_you_mean

if TYPE_CHECKING:
    from nemo_rl.utils.checkpoint import Checkpoint


class MetricRecorder(Protocol):
    """Receives the metrics of a run."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None: ...


@contextlib.contextmanager
def checkpoint_remedies(checkpoint: Checkpoint) -> Iterator[None]:
    """Add to a `CheckpointError` of the block what the user can do about it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{sentence(error)}. If the checkpoint is damaged, remove {checkpoint.path}: the run resumes from the "
            "previous checkpoint. If it belongs to another run, set another checkpointing.checkpoint_dir"
        ) from error


def check_metric_names(named: Mapping[str, str], measured: Iterable[str]) -> None:
    """Raise `ConfigError` if a metric is not measured. `named` has the metrics by their configuration keys."""
    names = sorted(measured)
    for key, name in named.items():
        if name not in names:
            raise ConfigError(f"{key}={name} is not measured.{did_you_mean(name, names)} Measured: {', '.join(names)}.")
