"""Checkpoints on disk: complete or not there, the latest and the best kept, damaged ones never loaded.

    checkpoints/
      step_000020/
        policy/...          written by the policy workers
        state.json          step, data position, metrics: whatever the loop needs to go on
        checkpoint.json     every file with its size; written last
      .partial-step_000030  being written; becomes step_000030 by one rename

A process killed at any moment leaves only complete checkpoints under their final names.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from nemo_rl.errors import CheckpointError
from nemo_rl.utils.config import ConfigModel

logger = logging.getLogger(__name__)

_MANIFEST = "checkpoint.json"
_STATE = "state.json"
_PARTIAL = ".partial-"


class CheckpointingConfig(ConfigModel):
    """When checkpoints are written and which are kept."""

    enabled: bool = Field(True, description="Write checkpoints.")
    checkpoint_dir: str | None = Field(None, description="Null: log_dir/checkpoints.")
    save_period: int = Field(10, ge=1, description="Write a checkpoint every N steps, and at the end.")
    keep_top_k: int | None = Field(
        3, ge=1, description="Keep the k best by metric_name, besides the latest. Null: all."
    )
    metric_name: str = Field("val/accuracy", description="Metric that ranks checkpoints.")
    higher_is_better: bool = Field(True, description="Whether a higher metric is better.")


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint: its step, its directory, and the metrics known when it was written."""

    step: int
    path: Path
    metrics: Mapping[str, float]

    def state(self) -> dict[str, Any]:
        """What the loop saved, as it was. Raises `CheckpointError` when it cannot be read."""
        try:
            return json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {self.path}: {_STATE} cannot be read ({error})") from error


class CheckpointStore:
    """The checkpoints of one run. One process writes at a time: the run directory's lock sees to it."""

    def __init__(self, directory: Path, config: CheckpointingConfig) -> None:
        self.directory = directory
        self._config = config

    def save(
        self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float], write: Callable[[Path], None]
    ) -> Checkpoint:
        """Write a checkpoint and drop those that need not be kept.

        Args:
            step: the training step that has been completed.
            state: JSON data that `Checkpoint.state` gives back.
            metrics: latest metrics; `checkpointing.metric_name` among them ranks the checkpoint.
            write: writes the policy's files into the directory that it is given.

        Raises:
            CheckpointError: the files cannot be written; earlier checkpoints are as they were.
        """
        final = self.directory / _name(step)
        partial = self.directory / f"{_PARTIAL}{final.name}"
        try:
            self._remove_partial()
            partial.mkdir(parents=True)
            write(partial)
            (partial / _STATE).write_text(json.dumps(dict(state)), encoding="utf-8")
            _seal(partial, step, metrics)
            if final.exists():  # an older life of this run wrote the same step
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self.directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"cannot write the checkpoint of step {step} to {final}: {error}") from error
        except CheckpointError:  # on a disk that is full, half a checkpoint is in the way of everything else
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._retain()
        return Checkpoint(step, final, dict(metrics))

    def complete(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first; a damaged one is left out with a warning that names the fault."""
        found = []
        for path in sorted(self.directory.glob("step_*")):
            try:
                found.append(_open(path))
            except CheckpointError as error:
                logger.warning("%s: it is not used", error)
        return found

    def latest(self) -> Checkpoint | None:
        """The complete checkpoint of the highest step, or None."""
        checkpoints = self.complete()
        return checkpoints[-1] if checkpoints else None

    def best(self) -> Checkpoint | None:
        """The complete checkpoint with the best `checkpointing.metric_name`, or None if none has it."""
        ranked = self._ranked(self.complete())
        return ranked[0] if ranked else None

    def _ranked(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        name, sign = self._config.metric_name, -1.0 if self._config.higher_is_better else 1.0
        scored = [c for c in checkpoints if math.isfinite(c.metrics.get(name, math.nan))]
        return sorted(scored, key=lambda c: (sign * c.metrics[name], -c.step))

    def _retain(self) -> None:
        if self._config.keep_top_k is None:
            return
        checkpoints = self.complete()
        # The one before the latest stays too, to fall back on if the latest turns out to be damaged.
        keep = {c.path for c in (*self._ranked(checkpoints)[: self._config.keep_top_k], *checkpoints[-2:])}
        for checkpoint in checkpoints:
            if checkpoint.path not in keep:
                # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name.
                doomed = self.directory / f"{_PARTIAL}old-{checkpoint.path.name}"
                checkpoint.path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _remove_partial(self) -> None:
        for leftover in self.directory.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _seal(directory: Path, step: int, metrics: Mapping[str, float]) -> None:
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        _sync(path)
        files[path.relative_to(directory).as_posix()] = path.stat().st_size
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    manifest = directory / _MANIFEST
    manifest.write_text(json.dumps({"step": step, "metrics": finite, "files": files}, indent=1), encoding="utf-8")
    _sync(manifest)
    _sync(directory)


def _open(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name, size in manifest["files"].items():
            actual = (path / name).stat().st_size
            if actual != size:
                raise CheckpointError(f"checkpoint {path}: {name} has {actual} bytes instead of {size}")
        return Checkpoint(int(manifest["step"]), path, manifest["metrics"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error})") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
