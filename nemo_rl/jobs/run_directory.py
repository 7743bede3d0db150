"""One directory per run, with one owner at a time; the same command goes on with an unfinished run.

    DIR/
      config.yaml        the resolved configuration
      metrics.jsonl  samples.jsonl  timeline.jsonl  attestation.json
      checkpoints/   tensorboard/   report.html
      finished.json      there once the run has ended by itself: its last step and why it ended
      run.lock           held (flock) by the driver that works here

With `logger.log_dir` set, DIR is that directory. Without it, runs are numbered below `results/<config name>/`: the last
one is resumed if it has the same configuration and has not finished, else the next number is taken.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import ConfigError
from nemo_rl.secrets import mask_secrets
from nemo_rl.utils.config import dump_yaml, load_config
from nemo_rl.utils.files import write_atomically

# What may differ between the lives of one run: when it stops, and what is told to whom. Everything else decides
# what the numbers mean.
CHANGEABLE = (
    "grpo.max_num_steps",
    "grpo.max_num_epochs",
    "grpo.max_time_s",
    "grpo.early_stop",
    "logger.",
    "checkpointing.",
)
_CONFIG, _FINISHED, _LOCK = "config.yaml", "finished.json", "run.lock"


@dataclass
class RunDirectory:
    """An opened run directory; the lock is held until `close` or the end of the process."""

    path: Path
    checkpoint_dir: Path
    is_new: bool
    _lock: IO[str]

    def finish(self, step: int, reason: str) -> None:
        """Mark the run as ended by itself."""
        write_atomically(self.path / _FINISHED, json.dumps({"step": step, "reason": reason}))

    def finished(self) -> dict[str, Any] | None:
        """`step` and `reason` if the run has ended by itself, else None."""
        return _finished(self.path)

    def reopen(self) -> None:
        """Take the mark of an ended run away, because there is more to do."""
        (self.path / _FINISHED).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process open the directory."""
        self._lock.close()


def open_run_directory(config: MasterConfig, name: str, root: Path = Path("results")) -> RunDirectory:
    """Choose, create and lock the directory of a run, and save the configuration in it.

    Args:
        config: the resolved configuration.
        name: name of the configuration, for numbered runs.
        root: where numbered runs are kept.

    Raises:
        ConfigError: the directory is in use by another process, cannot be written, or holds a run with a
            configuration that means something else (the message lists the keys).
    """
    if config.logger.log_dir is not None:
        path = Path(config.logger.log_dir)
    else:
        path = _numbered(config, root / name)
    path = path.absolute()
    checkpoints = Path(config.checkpointing.checkpoint_dir or path / "checkpoints").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except OSError as error:
        raise ConfigError(
            f"run directory {path} cannot be used: {error}. Set logger.log_dir to another place"
        ) from error
    try:
        if config.checkpointing.enabled:
            _check_writable(checkpoints)
        is_new = not (path / _CONFIG).exists()
        if not is_new:
            _check_same_run(path, config)
        # As it is, because a run that goes on compares with it; so nobody else may read one that holds a secret.
        plain = config.model_dump(mode="json")
        write_atomically(path / _CONFIG, dump_yaml(config), private=mask_secrets(plain) != plain)
    except BaseException:
        lock.close()
        raise
    return RunDirectory(path, checkpoints, is_new, lock)


def _check_writable(checkpoints: Path) -> None:
    """Raise `ConfigError` now rather than at the first checkpoint, when hours of training may be lost."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=checkpoints).close()
    except OSError as error:
        raise ConfigError(
            f"no checkpoint can be written to {checkpoints}: {error}. Set checkpointing.checkpoint_dir to another "
            "place, or checkpointing.enabled=false"
        ) from error


def differing_keys(old: MasterConfig, new: MasterConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose change makes it another run, with both values."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(CHANGEABLE)
    }


def _numbered(config: MasterConfig, parent: Path) -> Path:
    numbers = sorted(int(p.name) for p in parent.glob("[0-9]*") if p.name.isdigit())
    if not numbers:
        return parent / "001"
    last = parent / f"{numbers[-1]:03d}"
    if _finished(last) is None and not _is_locked(last):
        try:
            if not differing_keys(load_config(MasterConfig, last / _CONFIG), config):
                return last
        except ConfigError:  # written by another version of this package: it is not ours to resume
            pass
    return parent / f"{numbers[-1] + 1:03d}"


def _check_same_run(path: Path, config: MasterConfig) -> None:
    different = differing_keys(load_config(MasterConfig, path / _CONFIG), config)
    if different:
        shown = mask_secrets({key: list(values) for key, values in different.items()})
        changes = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in shown.items())
        raise ConfigError(
            f"{path} holds a run with another configuration ({changes}). "
            "Use another logger.log_dir, or give the old values to go on with it"
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
