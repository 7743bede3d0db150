"""Who hears of a run's metrics besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow.

A new backend is one class and one line in `BACKENDS`. A backend's package is imported when it is enabled, and the
backend works in a thread of its own (see `logger.Logger`), so that a slow server does not slow training down.
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

Metrics = Mapping[str, float]


class Backend(Protocol):
    """Receives what is logged, in a thread of its own. One that raises, whatever it raises, is told nothing more."""

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Finite metrics by flat name. The same step may be logged several times, with other names."""

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """The configuration by dotted name, secrets masked."""

    def close(self) -> None:
        """Everything is logged."""


@dataclass(frozen=True)
class RunInfo:
    """What a backend is opened with.

    Attributes:
        directory: the run's directory.
        config: the `logger` section.
        resume_step: the step that a resumed run goes on from; None for a new one.
    """

    directory: Path
    config: LoggerConfig
    resume_step: int | None

    def remembered_id(self, backend: str) -> str | None:
        """The id under which an earlier life of the run was logged to `backend`."""
        path = self.directory / f"{backend}_run_id.txt"
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def remember_id(self, backend: str, run_id: str) -> None:
        """Keep the id for the next life of the run."""
        (self.directory / f"{backend}_run_id.txt").write_text(run_id + "\n", encoding="utf-8")


class TensorBoardBackend:
    """Event files in `directory/tensorboard`, by TensorBoard's own writer, which imports no torch."""

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._writer: Any = None

    def _open(self) -> None:
        # At first use, which is in the backend's thread: the imports cost a third of a second.
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._tensor, self._types = event_pb2, summary_pb2, tensor_pb2, types_pb2
        self._writer = EventFileWriter(str(self._run.directory / "tensorboard"), flush_secs=10)
        if self._run.resume_step is not None:
            # Tells TensorBoard to forget what an earlier life of the run logged beyond the checkpoint.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(self._run.resume_step + 1, session_log=start)

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """One scalar per metric."""
        if self._writer is None:
            self._open()
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step, summary=self._summary.Summary(value=values))

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """The configuration as text."""
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
    """Weights & Biases. A resumed run goes on as the same W&B run."""

    def __init__(self, run: RunInfo) -> None:
        import wandb

        options = run.config.wandb
        run_id = run.remembered_id("wandb") or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=options.project,
            name=options.name or run.directory.name,
            id=run_id,
            resume="allow",
            dir=str(run.directory),
        )
        run.remember_id("wandb", run_id)
        # W&B's own step may only grow; ours repeats (training and validation) and goes back when a run resumes.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """One history record."""
        self._run.log({**metrics, "step": step})

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """The run's config."""
        self._run.config.update(dict(values), allow_val_change=True)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowBackend:
    """MLflow, through its client: no global state. A resumed run goes on as the same MLflow run."""

    _PARAMS_PER_CALL = 100
    _MAX_PARAM_CHARS = 500

    def __init__(self, run: RunInfo) -> None:
        import mlflow
        import mlflow.entities

        options = run.config.mlflow
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient(tracking_uri=options.tracking_uri)
        run_id = run.remembered_id("mlflow")
        self._is_new = run_id is None
        if run_id is None:
            experiment = self._client.get_experiment_by_name(options.experiment_name)
            experiment_id = (
                experiment.experiment_id if experiment else self._client.create_experiment(options.experiment_name)
            )
            name = options.run_name or run.directory.name
            run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
            run.remember_id("mlflow", run_id)
        self._run_id = run_id

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """One request. MLflow's names know no @: pass@1 becomes pass_at_1."""
        now_ms = int(time.time() * 1000)
        values = [
            self._entities.Metric(name.replace("@", "_at_"), float(value), now_ms, step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self._run_id, metrics=values)

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """The run's parameters, of its first life: MLflow lets none be changed."""
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
    """A backend: whether the configuration asks for it, how it is made, and the package that it needs."""

    enabled: Callable[[LoggerConfig], bool]
    open: Callable[[RunInfo], Backend]
    package: str | None = None


BACKENDS: dict[str, BackendEntry] = {
    "tensorboard": BackendEntry(lambda config: config.tensorboard, TensorBoardBackend),
    "wandb": BackendEntry(lambda config: config.wandb.enabled, WandbBackend, package="wandb"),
    "mlflow": BackendEntry(lambda config: config.mlflow.enabled, MlflowBackend, package="mlflow"),
}


def check_packages(config: LoggerConfig) -> None:
    """Raise `ConfigError`, with the command that helps, if an enabled backend's package is missing. Imports none."""
    for name, entry in BACKENDS.items():
        if entry.enabled(config) and entry.package and not _is_installed(entry.package):
            raise ConfigError(
                f"logger.{name} is enabled, but the package {entry.package!r} is not installed. "
                f"Start the job with `uv run --extra {name} ...`, or set logger.{name}.enabled=false"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that is there, but without a spec
        return False
