"""What an executor is, and what all of them share."""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ray import cloudpickle
from ray.exceptions import ObjectLostError

from nemo_rl.distributed.futures import WORKER_DEATHS
from nemo_rl.distributed.provisioning.source_sync import outside_python, search_path
from nemo_rl.errors import PipelineDefinitionError, PipelineError, ResourceInsufficientError, StageError
from nemo_rl.pipelines import bootstrap
from nemo_rl.pipelines.failures import FAILED_DIR, write_failure
from nemo_rl.pipelines.items import Item
from nemo_rl.pipelines.own_files import read_own
from nemo_rl.pipelines.progress import WorkerCounts
from nemo_rl.pipelines.runner import StageJob, stop_file
from nemo_rl.pipelines.spool import Entry, SpooledTask, SpoolWriter
from nemo_rl.pipelines.stage import AnyStage

logger = logging.getLogger(__name__)

# Whatever runs a stage must not have to find our modules first.
cloudpickle.register_pickle_by_value(bootstrap)


@dataclass(frozen=True)
class PlannedStage:
    """A stage whose Python is ready.

    Attributes:
        job: for its workers.
        num_cpus, num_gpus: of one worker.
        runtime_env: for Ray; empty: the driver's Python.
        env_vars: that the worker sets by itself: secrets, for Ray logs every runtime_env.
        search_path: see `bootstrap`.
    """

    job: StageJob
    num_cpus: float
    num_gpus: float
    runtime_env: dict[str, Any] = field(repr=False)
    env_vars: dict[str, str] = field(repr=False)
    search_path: list[str] = field(repr=False)

    @property
    def name(self) -> str:
        return self.job.stage.name

    @property
    def batch_size(self) -> int:
        return self.job.stage.batch_size

    @property
    def constructor_arguments(self) -> tuple[bytes, list[str], dict[str, str]]:
        """Of `bootstrap.StageWorker`. Raises `PipelineDefinitionError` when the stage cannot be pickled."""
        try:
            payload = cloudpickle.dumps(self.job)
        except Exception as error:
            raise PipelineDefinitionError(
                f"stage {self.name!r} cannot be sent to its workers: {type(error).__name__}: {error}. Create what "
                "cannot be pickled in setup()."
            ) from error
        return payload, self.search_path, self.env_vars

    def max_num_workers(self, cluster: Cluster, limit: int | None = None) -> int:
        """How many workers the stage may have: what it asks for, else what the whole cluster has room for."""
        if self.job.stage.num_workers is not None:
            return self.job.stage.num_workers
        room = [cluster.num_cpus / self.num_cpus] if self.num_cpus else []
        room += [cluster.num_gpus / self.num_gpus] if self.num_gpus else []
        number = max(1, int(min(room, default=cluster.num_cpus)))
        return number if limit is None else min(number, limit)


@dataclass(frozen=True)
class Cluster:
    """What the Ray cluster has in total."""

    num_cpus: float
    num_gpus: float


class WorkersDied(Exception):
    """Workers died, and the executor cannot go on by itself: what is not done must run again.

    Attributes:
        error: what the run ends with when it does not.
    """

    def __init__(self, error: PipelineError) -> None:
        super().__init__(str(error))
        self.error = error


class Executor(Protocol):
    """Runs the stages of one segment over its tasks.

    All executors give the same result: keys decide the order, and what a task becomes is decided by the stage alone.
    One that runs a stage over all tasks before it starts the next has an attribute `stage_by_stage = True`. One that
    needs room for several stages at once has a method `check_room(wanted, cluster)`; `wanted` holds the stages of a
    segment, each with the CPUs and GPUs of one worker, and it raises `ResourceInsufficientError`. It is called for all
    segments before anything runs.
    """

    def run(self, stages: Sequence[PlannedStage], items: Sequence[Item], cluster: Cluster) -> list[Item]:
        """Run all stages over all items and return what they became, in any order; nothing where the last one spools.

        Raises:
            StageError: a stage could not start, or a task failed and the run is to stop.
            PipelineError: anything else that ends the run.
            WorkersDied: the run calls this again, with what is not done, and as another attempt.
        """
        ...


def cpu_share(stages: Sequence[PlannedStage], num_cpus: float) -> float:
    """What part of its CPUs each stage asks for, so that workers of every stage can run on `num_cpus` together."""
    wanted = sum(stage.num_cpus * (stage.job.stage.num_workers or 1) for stage in stages)
    if wanted <= num_cpus:
        return 1.0
    logger.info("the stages need %g CPUs at the same time and share %g", wanted, num_cpus)
    return num_cpus / wanted * 0.99


def require_gpus_together(
    wanted: Sequence[tuple[AnyStage, tuple[float, float]]], cluster: Cluster, library: str
) -> None:
    """`Executor.check_room` where all stages run at once. Raises `ResourceInsufficientError`: too few GPUs for them."""
    num_gpus = sum(gpus * (stage.num_workers or 1) for stage, (_, gpus) in wanted)
    if num_gpus > cluster.num_gpus:
        names = ", ".join(stage.name for stage, (_, gpus) in wanted if gpus)
        raise ResourceInsufficientError(
            f"all stages run at the same time on {library}; {names} need {num_gpus:g} GPUs and the cluster has "
            f"{cluster.num_gpus:g}. RayActorPoolExecutor runs one stage after another."
        )


def driver_search_path() -> list[str]:
    """Directories of the driver's `sys.path` that are not its Python's or its venv's; first what stands for them on
    nodes that do not have them."""
    return [*search_path(), *outside_python(sys.path)]


def stage_error(error: BaseException | None) -> PipelineError | None:
    """The error of ours that caused what Ray or a library on top of it raised; None when there is none."""
    for cause in _causes(error):
        if isinstance(cause, PipelineError) and type(cause).__module__ == PipelineError.__module__:
            return cause
    return None


def is_death(error: BaseException) -> bool:
    """Whether workers died, or tasks were lost with their node, behind what Ray or a library on top of it raised."""
    return any(isinstance(cause, (*WORKER_DEATHS, ObjectLostError)) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error itself, and all that led to it."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__, getattr(current, "cause", None)]


def recorded_error(job: StageJob) -> PipelineError | None:
    """The error with which a worker stopped this run, for executors that do not hand it on as it is."""
    path = stop_file(job)
    return pickle.loads(read_own(path)) if path.exists() else None


def blame(stage: PlannedStage, item: Item, reason: str, attempts: int) -> None:
    """Set a task aside that brings its workers down, and count it.

    Raises:
        StageError: the run is to stop.
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


def loaded(name: str, extra: str) -> ModuleType:
    """Import an optional library. Raises `PipelineDefinitionError` that says how to get it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PipelineDefinitionError(
            f"{name} is needed here and cannot be imported ({error}). Install it with the extra {extra!r}: "
            f"`uv sync --extra {extra}`."
        ) from error
