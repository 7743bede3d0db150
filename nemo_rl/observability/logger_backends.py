"""Sends metrics to logging backends: TensorBoard, Weights & Biases and MLflow.

A new backend is one class and one line in `BACKENDS`. Its package is imported only if the backend is enabled. Each
backend runs in a separate thread (see `logger.Logger`), so a slow server does not slow down training.
"""

from __future__ import annotations

import importlib.util
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_rl.errors import ConfigError
from nemo_rl.observability.logger_config import LoggerConfig
from nemo_rl.utils.files import write_atomically

Metrics = Mapping[str, float]


class Backend(Protocol):
    """Receives metrics in a separate thread. After any exception, the backend is disabled for the rest of the run."""

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Log finite metrics by flat name. A step may be logged several times, with different names."""

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Log the configuration by dotted name, with secrets masked."""

    def close(self) -> None:
        """Finish. No call follows."""


@dataclass(frozen=True)
class RunInfo:
    """Holds the arguments for opening a backend.

    Attributes:
        directory: the run's directory.
        config: the `logger` section.
        resume_step: step from which the run resumes; None for a new run.
    """

    directory: Path
    config: LoggerConfig
    resume_step: int | None

    def load_id(self, backend: str) -> str | None:
        """Return the backend's id of this run if an earlier start of the run stored it completely."""
        path = self.directory / f"{backend}_run_id.txt"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        run_id = text.strip()
        return run_id if text.endswith("\n") and run_id.isprintable() and run_id else None

    def save_id(self, backend: str, run_id: str) -> None:
        """Store the backend's id of this run for a later resume."""
        write_atomically(self.directory / f"{backend}_run_id.txt", run_id + "\n")


class TensorBoardBackend:
    """Writes event files to `directory/tensorboard` with TensorBoard's own writer, which does not import torch."""

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._writer: Any = None

    def _open(self) -> None:
        # Opened at first use, in the backend's thread: the imports take a third of a second.
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._tensor, self._types = event_pb2, summary_pb2, tensor_pb2, types_pb2
        self._writer = EventFileWriter(str(self._run.directory / "tensorboard"), flush_secs=10)
        if self._run.resume_step is not None:
            # Makes TensorBoard discard what was logged after the checkpoint before the run was resumed.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(self._run.resume_step + 1, session_log=start)

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Write one scalar per metric."""
        if self._writer is None:
            self._open()
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step, summary=self._summary.Summary(value=values))

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Write the configuration as text."""
        if self._writer is None:
            self._open()
        text = "\n".join(f"    {name}: {json.dumps(value, default=str)}" for name, value in values.items())
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        value = self._summary.Summary.Value(
            tag="config/text_summary",
            metadata=self._summary.SummaryMetadata(plugin_data=plugin),
            tensor=self._tensor.TensorProto(dtype=self._types.DT_STRING, string_val=[text.encode()]),
        )
        self._write(0, summary=self._summary.Summary(value=[value]))

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))


class WandbBackend:
    """Logs to Weights & Biases. A resumed run continues the same W&B run."""

    def __init__(self, run: RunInfo) -> None:
        import wandb

        options = run.config.wandb
        run_id = run.load_id("wandb") or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=options.project,
            name=options.name or run.directory.name,
            id=run_id,
            resume="allow",
            dir=str(run.directory),
        )
        run.save_id("wandb", run_id)
        # W&B's step must increase. Our steps repeat (training and validation) and go back when a run resumes.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Log one history record."""
        self._run.log({**metrics, "step": step})

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Update the run's config."""
        self._run.config.update(dict(values), allow_val_change=True)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowBackend:
    """Logs to MLflow through its client, without global state. A resumed run continues the same MLflow run."""

    _PARAMS_PER_CALL = 100
    _MAX_PARAM_CHARS = 500

    def __init__(self, run: RunInfo) -> None:
        import mlflow
        import mlflow.entities

        options = run.config.mlflow
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient(tracking_uri=options.tracking_uri)
        run_id = run.load_id("mlflow")
        self._is_new = run_id is None
        if run_id is None:
            experiment = self._client.get_experiment_by_name(options.experiment_name)
            experiment_id = (
                experiment.experiment_id if experiment else self._client.create_experiment(options.experiment_name)
            )
            name = options.run_name or run.directory.name
            run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
            run.save_id("mlflow", run_id)
        self._run_id = run_id

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Log all metrics in one request. MLflow does not allow @ in names, so pass@1 becomes pass_at_1."""
        now_ms = int(time.time() * 1000)
        values = [
            self._entities.Metric(name.replace("@", "_at_"), float(value), now_ms, step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self._run_id, metrics=values)

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Log the run's parameters when the run is new. MLflow does not allow changing them later."""
        if not self._is_new:
            return
        params = [
            self._entities.Param(name, str(value)[: self._MAX_PARAM_CHARS] or "-") for name, value in values.items()
        ]
        for start in range(0, len(params), self._PARAMS_PER_CALL):
            self._client.log_batch(self._run_id, params=params[start : start + self._PARAMS_PER_CALL])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


@dataclass(frozen=True)
class BackendEntry:
    """Registers a backend.

    Attributes:
        enabled: returns whether the configuration enables the backend.
        open: creates the backend.
        package: the package that the backend needs, unless it is always installed.
    """

    enabled: Callable[[LoggerConfig], bool]
    open: Callable[[RunInfo], Backend]
    package: str | None = None


BACKENDS: dict[str, BackendEntry] = {
    "tensorboard": BackendEntry(lambda config: config.tensorboard, TensorBoardBackend),
    "wandb": BackendEntry(lambda config: config.wandb.enabled, WandbBackend, package="wandb"),
    "mlflow": BackendEntry(lambda config: config.mlflow.enabled, MlflowBackend, package="mlflow"),
}


def check_packages(config: LoggerConfig) -> None:
    """Raise `ConfigError` with the install command if an enabled backend's package is missing. Imports no package."""
    for name, entry in BACKENDS.items():
        if entry.enabled(config) and entry.package and not _is_installed(entry.package):
            raise ConfigError(
                f"logger.{name} is enabled, but the package {entry.package!r} is not installed. "
                f"Start the job with `uv run --extra {name} ...`, or set logger.{name}.enabled=false"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # the module is loaded but has no spec
        return False
