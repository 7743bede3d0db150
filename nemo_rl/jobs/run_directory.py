"""Manages run directories: one directory per run, one process at a time. The same command resumes an unfinished run.

    DIR/
      config.yaml        the resolved configuration
      started.json       when the run began
      metrics.jsonl  samples.jsonl  episodes.jsonl  timeline.jsonl  attestation.json
      data.json      number of records and tokens; reference_*.safetensors: see `algorithms.reference_logprobs`
      rollouts/      the samples of each training step, within logger.max_rollouts_mb
      eval/          what the evaluation in the background measured, with the files of `nemo-rl eval`
      checkpoints/   tensorboard/   report.html
      finished.json      last step and reason, written when the run reaches its end
      run.lock           locked (flock) by the running driver

DIR is `logger.log_dir` if set. Otherwise runs are numbered in `results/<config name>/`: the job resumes the last run if
its configuration is the same and it has not finished, else it creates the next number.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from nemo_rl.algorithms.eval_config import EvalConfig
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.job_config import RECORD_JOBS, JobConfig
from nemo_rl.secrets import mask_secrets
from nemo_rl.utils.config import dump_yaml, load_config
from nemo_rl.utils.files import write_atomically
from nemo_rl.venvs.storage.layout import make_generated_directory

# Keys that may change when a run is resumed: limits, logging and checkpointing. All other keys affect the results.
CHANGEABLE = (
    "grpo.max_num_steps",
    "grpo.max_num_epochs",
    "grpo.max_time_s",
    "grpo.early_stop",
    *(f"{job.section}.max_{limit}" for job in RECORD_JOBS for limit in ("num_steps", "num_epochs", "time_s")),
    "distillation.max_num_steps",
    "distillation.max_num_epochs",
    "distillation.max_time_s",
    "distillation.early_stop",
    "logger.",
    "checkpointing.",
)
_CONFIG, _STARTED, _FINISHED, _LOCK = "config.yaml", "started.json", "finished.json", "run.lock"


@dataclass
class RunDirectory:
    """Represents an open run directory, locked until `close` or the end of the process.

    Attributes:
        path: the directory.
        checkpoint_dir: where checkpoints are written.
        is_new: True if this process created the run.
        started: when the run began, in the local time of the node that began it. The same after a resume.
    """

    path: Path
    checkpoint_dir: Path
    is_new: bool
    started: datetime
    _lock: IO[str]

    def finish(self, step: int, reason: str) -> None:
        """Mark the run as finished."""
        write_atomically(self.path / _FINISHED, json.dumps({"step": step, "reason": reason}))

    def finished(self) -> dict[str, Any] | None:
        """Return `step` and `reason` if the run has finished, else None."""
        return _finished(self.path)

    def reopen(self) -> None:
        """Remove the mark of a finished run, to continue it."""
        (self.path / _FINISHED).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock, so that another process can open the directory."""
        self._lock.close()


def open_run_directory(config: JobConfig | EvalConfig, name: str, root: Path = Path("results")) -> RunDirectory:
    """Choose, create and lock the directory of a run, and save the configuration in it.

    Args:
        config: the resolved configuration.
        name: name of the configuration, for numbered runs.
        root: parent directory of numbered runs.

    Raises:
        ConfigError: the directory is in use by another process, is not writable, or holds a run with another
            configuration (the message lists the keys).
    """
    if config.logger.log_dir is not None:
        path = Path(config.logger.log_dir)
    else:
        path = _numbered(config, root / name)
    path = path.absolute()
    checkpoints = Path(config.checkpointing.checkpoint_dir or path / "checkpoints").absolute()
    try:
        make_generated_directory(path)
        lock = _lock(path)
    except OSError as error:
        raise ConfigError(
            f"run directory {path} cannot be used: {error}. Set logger.log_dir to another directory"
        ) from error
    try:
        if config.checkpointing.enabled:
            _check_writable(checkpoints)
        is_new = not (path / _CONFIG).exists()
        if not is_new:
            _check_same_run(path, config)
        # Secrets are not masked, because a resumed run compares its configuration; the file is then private.
        plain = config.model_dump(mode="json")
        write_atomically(path / _CONFIG, dump_yaml(config), private=mask_secrets(plain) != plain)
        started = start_of_run(path)
    except BaseException:
        lock.close()
        raise
    return RunDirectory(path, checkpoints, is_new, started, lock)


def start_of_run(directory: Path) -> datetime:
    """Return when the run in `directory` began. The first call for a directory records the current time there.

    Raises:
        ConfigError: the record cannot be read.
    """
    path = directory / _STARTED
    if not path.exists():
        write_atomically(path, json.dumps({"local_time": datetime.now().isoformat()}))
    try:
        return datetime.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["local_time"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); write the time at which the run began into it, as in "
            '{"local_time": "2026-01-31T12:00:00"}'
        ) from error


def _check_writable(checkpoints: Path) -> None:
    """Raise `ConfigError` before training, rather than at the first checkpoint."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=checkpoints).close()
    except OSError as error:
        raise ConfigError(
            f"no checkpoint can be written to {checkpoints}: {error}. Set checkpointing.checkpoint_dir to another "
            "directory, or checkpointing.enabled=false"
        ) from error


def differing_keys(old: JobConfig | EvalConfig, new: JobConfig | EvalConfig) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys that may not change in a resumed run but differ, with both values."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(CHANGEABLE)
    }


def _numbered(config: JobConfig | EvalConfig, parent: Path) -> Path:
    numbers = sorted(int(p.name) for p in parent.glob("[0-9]*") if p.name.isdigit())
    if not numbers:
        return parent / "001"
    last = parent / f"{numbers[-1]:03d}"
    if _finished(last) is None and not _is_locked(last):
        try:
            if not differing_keys(load_config(type(config), last / _CONFIG), config):
                return last
        except ConfigError:  # written by another version of this package, so it cannot be resumed
            pass
    return parent / f"{numbers[-1] + 1:03d}"


def _check_same_run(path: Path, config: JobConfig | EvalConfig) -> None:
    different = differing_keys(load_config(type(config), path / _CONFIG), config)
    if different:
        shown = mask_secrets({key: list(values) for key, values in different.items()})
        changes = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in shown.items())
        raise ConfigError(
            f"{path} holds a run with another configuration ({changes}). "
            "Set another logger.log_dir, or use the old values to resume it"
        )


def _finished(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / _FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _lock(path: Path) -> IO[str]:
    lock = (path / _LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ConfigError(
            f"run directory {path} is in use by {holder}; wait for it or set another logger.log_dir"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
    return lock


def _is_locked(path: Path) -> bool:
    try:
        with (path / _LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }
