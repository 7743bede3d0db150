"""Writes checkpoints atomically, keeps the latest and the best, and ignores damaged ones.

    checkpoints/
      step_000020/
        policy/...          written by the policy workers
        state.json          step, data position and metrics, which the loop needs to resume
        checkpoint.json     all files with their sizes; written last
      .partial-step_000030  being written; renamed to step_000030 when it is complete
      .replaced-step_000020 exists only while step 20 is saved again; deleted when the new one is on disk

If the process is killed at any moment, only complete checkpoints have their final names, and a checkpoint that was
complete before is still found: under its final name, or under its `.replaced-` name.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import uuid
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
_REPLACED = ".replaced-"
_NAME = re.compile(r"(\.replaced-)?step_\d+")


class CheckpointingConfig(ConfigModel):
    """Configures when checkpoints are written and which are kept."""

    enabled: bool = Field(True, description="Write checkpoints.")
    checkpoint_dir: str | None = Field(None, description="Null: log_dir/checkpoints.")
    save_period: int = Field(10, ge=1, description="Write a checkpoint every N steps, and at the end.")
    keep_top_k: int | None = Field(
        3, ge=1, description="Keep the k best checkpoints by metric_name, and the latest. Null: keep all."
    )
    metric_name: str = Field("val/accuracy", description="Metric by which checkpoints are ranked.")
    higher_is_better: bool = Field(True, description="Whether higher values of the metric are better.")


@dataclass(frozen=True)
class Checkpoint:
    """Describes a complete checkpoint: its step, its directory, and the latest metrics when it was written."""

    step: int
    path: Path
    metrics: Mapping[str, float]

    def state(self) -> dict[str, Any]:
        """Return the state that the loop saved. Raises `CheckpointError` if it cannot be read."""
        try:
            return json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {self.path}: {_STATE} cannot be read ({error})") from error


class CheckpointStore:
    """Manages the checkpoints of one run. The lock of the run directory ensures that only one process writes.

    Example::

        store = CheckpointStore(Path("checkpoints"), CheckpointingConfig(keep_top_k=1))
        store.save(20, {"step": 20}, {"val/accuracy": 0.5}, write_policy)
        state = store.latest().state()
    """

    def __init__(self, directory: Path, config: CheckpointingConfig) -> None:
        self.directory = directory
        self._config = config

    def save(
        self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float], write: Callable[[Path], None]
    ) -> Checkpoint:
        """Write a checkpoint, and delete those that need not be kept.

        Args:
            step: the training step that has been completed.
            state: JSON data that `Checkpoint.state` returns.
            metrics: the latest metrics. `checkpointing.metric_name` ranks the checkpoint.
            write: writes the policy's files to the directory that it receives.

        Raises:
            CheckpointError: the files cannot be written. Earlier checkpoints are unchanged.
        """
        final = self.directory / _name(step)
        partial = self.directory / f"{_PARTIAL}{final.name}"
        replaced = self.directory / f"{_REPLACED}{final.name}"
        try:
            self._clean_up()
            partial.mkdir(parents=True)
            write(partial)
            (partial / _STATE).write_text(json.dumps(dict(state)), encoding="utf-8")
            _seal(partial, step, metrics)
            if final.exists():  # the run wrote the same step before, for example before it was resumed
                final.rename(replaced)
            try:
                partial.rename(final)
            except OSError:
                if replaced.exists():
                    replaced.rename(final)
                raise
            _sync(self.directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"cannot write the checkpoint of step {step} to {final}: {error}") from error
        except CheckpointError:  # frees the space of the incomplete checkpoint, because the disk may be full
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if replaced.exists():
            self._delete(replaced)
        self._retain()
        return Checkpoint(step, final, dict(metrics))

    def complete(self) -> list[Checkpoint]:
        """Return complete checkpoints in the order of their steps. Damaged ones are skipped with a warning."""
        checkpoints: dict[str, Checkpoint] = {}
        paths = self.directory.iterdir() if self.directory.is_dir() else ()
        # A replaced checkpoint (its name sorts before the final name) counts only if the new one is not complete.
        for path in sorted(path for path in paths if _NAME.fullmatch(path.name)):
            try:
                checkpoints[path.name.removeprefix(_REPLACED)] = _open(path)
            except CheckpointError as error:
                logger.warning("%s: the checkpoint is ignored", error)
        return sorted(checkpoints.values(), key=lambda checkpoint: checkpoint.step)

    def latest(self) -> Checkpoint | None:
        """Return the complete checkpoint of the highest step, or None."""
        checkpoints = self.complete()
        return checkpoints[-1] if checkpoints else None

    def best(self) -> Checkpoint | None:
        """Return the complete checkpoint with the best `checkpointing.metric_name`, or None if none has the metric."""
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
        # The checkpoint before the latest is kept as well, in case the latest turns out to be damaged.
        keep = {c.path for c in (*self._ranked(checkpoints)[: self._config.keep_top_k], *checkpoints[-2:])}
        for checkpoint in checkpoints:
            if checkpoint.path not in keep:
                self._delete(checkpoint.path)

    def _delete(self, path: Path) -> None:
        # Renamed first: a kill during the removal must not leave an incomplete checkpoint under its name.
        doomed = self.directory / f"{_PARTIAL}old-{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            path.rename(doomed)
        except OSError as error:  # the new checkpoint is complete; the next save deletes this one
            logger.warning("cannot delete the checkpoint %s: %s", path, error)
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def _clean_up(self) -> None:
        """Finish what a killed save left behind: restore or delete replaced checkpoints, delete incomplete ones."""
        for checkpoint in self.complete():
            if checkpoint.path.name.startswith(_REPLACED):
                final = checkpoint.path.with_name(checkpoint.path.name.removeprefix(_REPLACED))
                if final.exists():  # it is not complete
                    self._delete(final)
                checkpoint.path.rename(final)
        for replaced in self.directory.glob(f"{_REPLACED}*"):
            self._delete(replaced)
        for leftover in self.directory.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _seal(directory: Path, step: int, metrics: Mapping[str, float]) -> None:
    files = {}
    for path in sorted(directory.rglob("*")):
        _sync(path)  # a directory too: a file's name is on disk only when its directory is
        if path.is_file():
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
