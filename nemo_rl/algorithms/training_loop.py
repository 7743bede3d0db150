"""What the training loops of all algorithms share."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
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


class ValidationSchedule(Protocol):
    """When a loop validates: every `period` steps (0: never), before the first and after the last step."""

    @property
    def period(self) -> int: ...

    @property
    def at_start(self) -> bool: ...

    @property
    def at_end(self) -> bool: ...


class TrainingLoop(ABC):
    """Repeats steps, validations and checkpoints until a limit is reached. A subclass is one algorithm.

    Attributes:
        step: number of completed training steps.
        on_first_step: called once, before the first step of this process.
        on_weights: called with `step` before the first step of this process, and after each step before its checkpoint.
            Until it returns, the policy has the weights after that step.
    """

    step: int
    on_first_step: Callable[[], None]
    on_weights: Callable[[int], None] = staticmethod(lambda step: None)
    _last_validation: dict[str, float]

    @abstractmethod
    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint instead of from the start. Raises `CheckpointError` if it cannot be loaded."""

    @abstractmethod
    def run(self) -> str:
        """Train until a limit is reached; return the reason for the end as a short phrase."""

    def train_until_limit(self, validation: ValidationSchedule, *, save_period: int, num_epochs: int | None) -> str:
        """Train, and return the reason for the end as a short phrase.

        Args:
            validation: when to validate.
            save_period: steps between two checkpoints. The last step is saved, too.
            num_epochs: passes over the data, after which there is no further step.
        """
        started = time.monotonic()
        if self.step == 0 and validation.at_start:
            self._validate()
        self.on_weights(self.step)
        self.on_first_step()
        while (reason := self._reason_to_stop(started)) is None:
            if not self._train_step():
                reason = epochs_done(num_epochs)
                break
            self.on_weights(self.step)
            if validation.period and self.step % validation.period == 0:
                self._validate()
            if self.step % save_period == 0:
                self._save()
        unsaved = self.step % save_period != 0
        if validation.at_end and self._last_validation.get("step") != self.step:
            self._validate()
            unsaved = True  # otherwise a restart before `finished.json` is written would record it again
        if unsaved:
            self._save()
        return reason

    @abstractmethod
    def _train_step(self) -> bool:
        """Run one step; return False if there is no more data."""

    @abstractmethod
    def _validate(self) -> None:
        """Measure the policy, and set `_last_validation` to the metrics and the `step`; nothing without data."""

    @abstractmethod
    def _save(self) -> None:
        """Write a checkpoint, if checkpoints are enabled."""

    @abstractmethod
    def _reason_to_stop(self, started: float) -> str | None:
        """Return which limit is reached, or None. `started` is the `time.monotonic()` at which this process began."""


def epochs_done(num_epochs: int | None) -> str:
    """Return the reason for the end of a run that has used all of its data."""
    return f"all {num_epochs} epochs are done" if num_epochs != 1 else "the epoch is done"
