"""Defines the executor protocol, and helpers that all executors share."""

from __future__ import annotations

import hashlib
import logging
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ray import cloudpickle
from ray.exceptions import ObjectLostError

from nemo_rl.distributed.futures import WORKER_DEATHS
from nemo_rl.distributed.provisioning.source_sync import outside_python, search_path
from nemo_rl.errors import PipelineDefinitionError, PipelineError, ResourceInsufficientError, StageError, causes
from nemo_rl.pipelines import bootstrap
from nemo_rl.pipelines.failures import FAILED_DIR, write_failure
from nemo_rl.pipelines.items import Item
from nemo_rl.pipelines.progress import WorkerCounts
from nemo_rl.pipelines.runner import StageJob, stop_file
from nemo_rl.pipelines.spool import Entry, SpooledTask, SpoolWriter
from nemo_rl.pipelines.stage import AnyStage
from nemo_rl.pipelines.trusted_files import read_trusted

logger = logging.getLogger(__name__)

# A worker must be able to unpickle the bootstrap code before it can import this package.
cloudpickle.register_pickle_by_value(bootstrap)


@dataclass(frozen=True)
class PlannedStage:
    """Describes a stage whose Python is ready.

    Attributes:
        job: the description for the stage's workers.
        num_cpus, num_gpus: resources of one worker.
        runtime_env: Ray's `runtime_env`. If it is empty, workers run in the driver's Python.
        env_vars: variables that the worker itself sets. They may be secrets, and Ray logs every `runtime_env`.
        search_path: entries that the worker appends to `sys.path`, see `bootstrap`.
        python_id: identifies the Python and its packages within this session; None if they may differ from one start
            to the next.
    """

    job: StageJob
    num_cpus: float
    num_gpus: float
    runtime_env: dict[str, Any] = field(repr=False)
    env_vars: dict[str, str] = field(repr=False)
    search_path: list[str] = field(repr=False)
    python_id: str | None = None

    @property
    def name(self) -> str:
        return self.job.stage.name

    @property
    def batch_size(self) -> int:
        return self.job.stage.batch_size

    @property
    def constructor_arguments(self) -> tuple[bytes, list[str], dict[str, str]]:
        """Arguments of `bootstrap.StageWorker`. Raises `PipelineDefinitionError` if the stage cannot be pickled."""
        try:
            payload = cloudpickle.dumps(self.job)
        except Exception as error:
            raise PipelineDefinitionError(
                f"stage {self.name!r} cannot be sent to its workers: {type(error).__name__}: {error}. Create "
                "objects that cannot be pickled in setup()."
            ) from error
        return payload, self.search_path, self.env_vars

    @property
    def worker_key(self) -> bytes | None:
        """Equal for stages of this process whose workers can replace each other; None if a worker can serve once only.

        It covers the stage with its attributes and, for a class that workers cannot import, its code; the Python; the
        environment variables; the search path; and the CPUs. It does not cover the code of modules, see `LoadedCode`.
        """
        if self.python_id is None or self.num_gpus or not self.num_cpus:
            return None
        content = (self.job.stage, self.num_cpus, self.runtime_env, self.env_vars, self.search_path, self.python_id)
        return hashlib.sha256(cloudpickle.dumps(content)).digest()

    def max_num_workers(self, cluster: Cluster, limit: int | None = None) -> int:
        """Return the maximum number of workers: the stage's `num_workers`, else as many as fit on the cluster."""
        if self.job.stage.num_workers is not None:
            return self.job.stage.num_workers
        capacities = [cluster.num_cpus / self.num_cpus] if self.num_cpus else []
        capacities += [cluster.num_gpus / self.num_gpus] if self.num_gpus else []
        number = max(1, int(min(capacities, default=cluster.num_cpus)))
        return number if limit is None else min(number, limit)


@dataclass(frozen=True)
class Cluster:
    """Holds the total resources of the Ray cluster."""

    num_cpus: float
    num_gpus: float


class WorkersDied(Exception):
    """Workers died and the executor cannot continue. The run must start it again for the unfinished inputs.

    Attributes:
        error: the error that ends the run if it does not start the executor again.
    """

    def __init__(self, error: PipelineError) -> None:
        super().__init__(str(error))
        self.error = error


class Executor(Protocol):
    """Runs the stages of one segment over its tasks.

    All executors give the same result, because keys determine the order and stages alone determine what a task becomes.

    Two members are optional. `stage_by_stage = True` marks an executor that runs a stage over all tasks before it
    starts the next stage. An executor that runs several stages at once can define `check_capacity(wanted, cluster)`,
    which raises `ResourceInsufficientError`. `wanted` holds the stages of a segment, each with the CPUs and GPUs of one
    worker. The run calls it for all segments before anything runs.
    """

    def run(self, stages: Sequence[PlannedStage], items: Sequence[Item], cluster: Cluster) -> list[Item]:
        """Run all stages over all items.

        Returns:
            The results in any order, or an empty list if the last stage writes its results to the spool.

        Raises:
            StageError: a stage could not start, or a task failed and `on_failure` is "stop".
            PipelineError: another error ended the run.
            WorkersDied: workers died. The run calls this method again, as another attempt, with the unfinished items.
        """
        ...


def cpu_share(stages: Sequence[PlannedStage], num_cpus: float) -> float:
    """Return the factor by which to scale the CPUs of all stages, so that every stage's workers fit on `num_cpus`."""
    wanted = sum(stage.num_cpus * (stage.job.stage.num_workers or 1) for stage in stages)
    if wanted <= num_cpus:
        return 1.0
    logger.info("the stages ask for %g CPUs at the same time and share %g", wanted, num_cpus)
    return num_cpus / wanted * 0.99


def require_gpus_together(
    wanted: Sequence[tuple[AnyStage, tuple[float, float]]], cluster: Cluster, library: str
) -> None:
    """Implement `Executor.check_capacity` for executors that run all stages at once.

    Raises:
        ResourceInsufficientError: the stages need more GPUs together than the cluster has.
    """
    num_gpus = sum(gpus * (stage.num_workers or 1) for stage, (_, gpus) in wanted)
    if num_gpus > cluster.num_gpus:
        names = ", ".join(stage.name for stage, (_, gpus) in wanted if gpus)
        raise ResourceInsufficientError(
            f"all stages run at the same time on {library}; {names} need {num_gpus:g} GPUs and the cluster has "
            f"{cluster.num_gpus:g}. RayActorPoolExecutor runs one stage after another."
        )


def driver_search_path() -> list[str]:
    """Return the entries of the driver's `sys.path` outside its Python and its venv.

    Directories that replace them on nodes without them come first.
    """
    return [*search_path(), *outside_python(sys.path)]


def stage_error(error: BaseException | None) -> PipelineError | None:
    """Return the `PipelineError` that caused an error of Ray or of a library on top of it, or None."""
    for cause in causes(error):
        if isinstance(cause, PipelineError) and type(cause).__module__ == PipelineError.__module__:
            return cause
    return None


def is_death(error: BaseException) -> bool:
    """Return whether an error was caused by the death of workers, or by tasks that were lost with their node."""
    return any(isinstance(cause, (*WORKER_DEATHS, ObjectLostError)) for cause in causes(error))


def recorded_error(job: StageJob) -> PipelineError | None:
    """Return the error with which a worker stopped this run. For executors that do not pass it on unchanged.

    Returns None if there is none, or if its file is incomplete.
    """
    try:
        content = read_trusted(stop_file(job))
    except FileNotFoundError:
        return None
    return pickle.loads(content) if content.endswith(pickle.STOP) else None


def set_aside_task(stage: PlannedStage, item: Item, reason: str, attempts: int) -> None:
    """Set aside a task whose workers die, and count it as failed.

    Raises:
        StageError: `on_failure` is "stop".
    """
    job = stage.job
    task = item.task.load() if isinstance(item.task, SpooledTask) else item.task
    record = {
        "stage": stage.name,
        "task_id": task.task_id,
        "lineage": task._lineage,
        "error": reason,
        "traceback": "",
        "attempts": attempts,
    }
    write_failure(Path(job.directory, FAILED_DIR), record, task, (job.segment, *item.key))
    counts = WorkerCounts(job.counts_directory)
    counts.counts.num_workers, counts.counts.failed = 0, 1
    counts.save()
    if job.on_failure == "stop":
        raise StageError(
            f"stage {stage.name!r} failed on task {task.task_id!r}: {reason}",
            stage=stage.name,
            task_id=task.task_id,
        )
    if job.spools:
        writer = SpoolWriter(job.spool_directory, job.attempt)
        writer.write([Entry("gone", item.key)])
        writer.close()


def import_optional(name: str, extra: str) -> ModuleType:
    """Import an optional library. Raises `PipelineDefinitionError` with the install command if it is missing."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PipelineDefinitionError(
            f"{name} is required and cannot be imported ({error}). Install it with the extra {extra!r}: "
            f"`uv sync --extra {extra}`."
        ) from error
