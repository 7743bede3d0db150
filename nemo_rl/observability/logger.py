"""Writes the metrics, samples, episodes and rollouts of a run to files, and the metrics to the enabled backends.

::

    training loop ──log_metrics──► metrics.jsonl                        synchronous, in the loop's thread
                        ├────────► listeners (console)                  synchronous, in the loop's thread
                        └────────► queue ──► thread ──► TensorBoard     one queue and thread per backend; a backend
                        └────────► queue ──► thread ──► W&B, MLflow     that fails or falls behind is disabled, with
                                                                        an error in the log

An evaluation in the background logs its metrics from its own thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from nemo_rl.errors import ConfigError
from nemo_rl.observability.logger_backends import BACKENDS, Backend, RunInfo, check_packages
from nemo_rl.observability.logger_config import LoggerConfig
from nemo_rl.observability.rollout_files import RolloutFiles
from nemo_rl.secrets import flatten, mask_secrets
from nemo_rl.utils.jsonl import append_text, keep_lines

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EPISODES_FILE = "episodes.jsonl"

_MAX_QUEUED = 1000
_CLOSE_TIMEOUT_S = 30.0


class Listener(Protocol):
    """Receives metrics synchronously, in the thread that logs them, one call at a time."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Logger.log_metrics`."""


class Logger:
    """Writes a run's metrics and samples to files, listeners and backends. Only `log_metrics` is thread-safe.

    Example::

        with Logger(directory, LoggerConfig(tensorboard=False)) as logger:
            logger.log_metrics(1, {"train/reward": 0.25})
    """

    def __init__(
        self,
        directory: Path,
        config: LoggerConfig,
        *,
        resume_step: int | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        """Open the files and the enabled backends.

        Args:
            directory: the run's directory, which must exist.
            config: the `logger` section.
            resume_step: step of the checkpoint from which the run resumes. Records of later steps are dropped, so the
                file is the same as without an interruption. None starts a new run and drops all records.
            listeners: called synchronously with every record.

        Raises:
            ConfigError: an enabled backend is not installed or cannot be opened.
        """
        check_packages(config)
        self._lock = threading.Lock()
        self._metrics_path, self._samples_path = directory / METRICS_FILE, directory / SAMPLES_FILE
        self._episodes_path = directory / EPISODES_FILE
        for path in (self._metrics_path, self._samples_path, self._episodes_path):
            num_dropped = keep_lines(path, lambda record: _is_before(record, resume_step))
            if num_dropped:
                logger.info("%s: dropped %d records that are newer than the checkpoint", path.name, num_dropped)
        self._rollouts = RolloutFiles(directory, limit_mb=config.max_rollouts_mb, resume_step=resume_step)
        self._listeners = list(listeners)
        run = RunInfo(directory, config, resume_step)
        self._backends: list[_BackendThread] = []
        try:
            for name, entry in BACKENDS.items():
                if entry.enabled(config):
                    self._backends.append(_BackendThread(name, _open(name, entry.open, run)))
        except BaseException:
            self.close()
            raise
        self._warned_names: set[str] = set()

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record: `step` and the metrics by flat name.

        A value that is not finite becomes null in the file, with one warning per name. Listeners and backends do not
        receive it.

        Raises:
            TypeError: a value is not a number.
            ValueError: a metric is named "step".
        """
        if "step" in metrics:
            raise ValueError("a metric cannot be named 'step': every record has this key")
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        with self._lock:
            self._log_numbers(step, numbers)

    def _log_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        for name in numbers.keys() - finite.keys() - self._warned_names:
            self._warned_names.add(name)
            logger.warning("step %d: %s is %s; %s stores null", step, name, numbers[name], METRICS_FILE)
        line = {"step": step} | {name: finite.get(name) for name in numbers}
        append_text(self._metrics_path, json.dumps(line, allow_nan=False) + "\n")
        for listener in list(self._listeners):
            try:
                listener.log_metrics(step, finite)
            except Exception:
                # An observer must not end the run.
                logger.exception("%s failed and is disabled for the rest of the run", type(listener).__name__)
                self._listeners.remove(listener)
        for backend in self._backends:
            backend.put(lambda b: b.log_metrics(step, finite))

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Store completions for the report, one record each. Values must be JSON data."""
        append_text(self._samples_path, "".join(json.dumps({"step": step, **sample}) + "\n" for sample in samples))

    def log_episodes(self, step: int, episodes: Sequence[Mapping[str, Any]]) -> None:
        """Record what became of each episode of a training step: trained, masked or replaced, and why.

        The records have no messages, so the file stays small.
        """
        records = [{"step": step, **{k: v for k, v in episode.items() if k != "messages"}} for episode in episodes]
        append_text(self._episodes_path, "".join(json.dumps(record) + "\n" for record in records))

    def log_rollouts(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep the samples of a training step, with tokens and messages. See `RolloutFiles`."""
        self._rollouts.write(step, samples)

    def log_hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Send the configuration (nested plain data) to the backends. Values that look like secrets are masked."""
        values = dict(flatten(mask_secrets(config)))
        for backend in self._backends:
            backend.put(lambda b: b.log_hyperparameters(values))

    def close(self) -> None:
        """Wait up to 30 s per backend until everything is written. Idempotent."""
        for backend in self._backends:
            backend.close()
        self._backends = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _is_before(record: Mapping[str, Any], resume_step: int | None) -> bool:
    step = record.get("step")
    return resume_step is not None and isinstance(step, int) and step <= resume_step


def _number(name: str, value: Any) -> float | int:
    item = value.item() if hasattr(value, "item") else value  # scalars of numpy and torch
    if isinstance(item, (bool, int, float)):
        return int(item) if isinstance(item, bool) else item
    raise TypeError(f"metric {name!r} must be a number, not {type(value).__name__} {value!r}")


def _open(name: str, make: Callable[[RunInfo], Backend], run: RunInfo) -> Backend:
    try:
        return make(run)
    except Exception as error:
        raise ConfigError(f"logger.{name} is enabled but cannot be opened: {error}") from error


class _BackendThread:
    """Runs a backend in a separate thread, and disables it at the first failure."""

    def __init__(self, name: str, backend: Backend) -> None:
        self._name = name
        self._backend = backend
        self._queue: queue.Queue[Callable[[Backend], None] | None] = queue.Queue(_MAX_QUEUED)
        self._disabled = False
        # A daemon thread: a server that does not answer must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"logger-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Backend], None]) -> None:
        """Queue a call of the backend."""
        if self._disabled:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._disable(f"it is {_MAX_QUEUED} records behind")

    def close(self) -> None:
        """Wait up to `_CLOSE_TIMEOUT_S` until the backend has processed its queue."""
        if not self._disabled:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=_CLOSE_TIMEOUT_S)
            self._thread.join(_CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                self._disable(f"it did not finish within {_CLOSE_TIMEOUT_S:g} s after the run")

    def _work(self) -> None:
        while not self._disabled:
            call = self._queue.get()
            try:
                if call is None:
                    self._backend.close()
                    return
                call(self._backend)
            except Exception as error:
                # Network, disk or server failed. The run continues, because `metrics.jsonl` has all metrics.
                self._disable(f"{type(error).__name__}: {error}")

    def _disable(self, reason: str) -> None:
        if not self._disabled:
            self._disabled = True
            logger.error("logger.%s is disabled for the rest of the run: %s", self._name, reason)
