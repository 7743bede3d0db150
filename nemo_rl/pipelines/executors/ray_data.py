"""Runs all stages at once on Ray Data. Each stage is an actor pool behind `map_batches`, and tasks stream through them.

Consecutive stages that ask for the same Python and the same CPUs share their workers: most of the time of a short run
is spent on starting processes.

A row of the data set is a group of tasks, and every block holds one row. Ray Data therefore schedules, applies
backpressure and spills per group.
"""

from __future__ import annotations

import gc
import os
import secrets
import traceback
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from types import FrameType
from typing import Any

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.util.annotations import RayDeprecationWarning

from nemo_rl.errors import PipelineError, StageError, causes
from nemo_rl.pipelines.bootstrap import DataStage
from nemo_rl.pipelines.executors.base import (
    Cluster,
    PlannedStage,
    WorkersDied,
    cpu_share,
    is_death,
    recorded_error,
    require_gpus_together,
    stage_error,
)
from nemo_rl.pipelines.items import Item, chunks, group_size
from nemo_rl.pipelines.stage import AnyStage

# Of functions whose local variables may refer to workers.
_SOURCES = (os.path.dirname(ray.__file__) + os.sep, __file__)
_MODULE = DataStage.__module__  # pickled by value


class RayDataExecutor:
    """Runs all stages at once on Ray Data. Tasks stream from stage to stage, with backpressure from slow stages.

    Example::

        pipeline.run(RayDataExecutor(max_workers_per_stage=4), run_dir="results/clean")

    Args:
        max_workers_per_stage: None allows as many workers as fit on the cluster. A stage's `num_workers` takes
            precedence.
        max_worker_deaths: how often Ray restarts each worker that died and runs its tasks again. The next death ends
            the Ray Data job, and the run starts another one for the unfinished inputs. Ray Data does not report which
            task caused the death.
    """

    def __init__(self, *, max_workers_per_stage: int | None = None, max_worker_deaths: int = 2) -> None:
        self._max_workers = max_workers_per_stage
        self._max_deaths = max_worker_deaths

    def check_capacity(self, wanted: Sequence[tuple[AnyStage, tuple[float, float]]], cluster: Cluster) -> None:
        """Check that the cluster has GPUs for all stages together. See `Executor.check_capacity`."""
        require_gpus_together(wanted, cluster, "Ray Data")

    def run(self, stages: Sequence[PlannedStage], items: Sequence[Item], cluster: Cluster) -> list[Item]:
        """See `Executor.run`."""
        if not items:
            return []
        # Workers have the class's name in theirs, so that those of this run can be told from all others.
        worker_class = type(f"{DataStage.__name__}_{secrets.token_hex(4)}", (DataStage,), {"__module__": _MODULE})
        try:
            return self._stream(worker_class, stages, items, cluster)
        except KeyboardInterrupt as error:
            _release_workers(error, worker_class)
            raise
        except Exception as error:  # Ray Data wraps what a stage raises and adds its own advice
            _release_workers(error, worker_class)
            cause = recorded_error(stages[0].job) or stage_error(error)
            if cause is not None:
                raise cause from error
            names = ", ".join(stage.name for stage in stages)
            if is_death(error):
                raise WorkersDied(StageError(f"a worker of one of the stages {names} died: {error}")) from error
            if isinstance(error, ray.exceptions.RayError):
                raise StageError(f"one of the stages {names} failed: {error}") from error
            raise PipelineError(f"Ray Data failed: {type(error).__name__}: {error}") from error

    def _stream(
        self, worker_class: type[DataStage], stages: Sequence[PlannedStage], items: Sequence[Item], cluster: Cluster
    ) -> list[Item]:
        shared = [list(together) for _, together in groupby(stages, key=_place)]  # stages in the same workers
        share = cpu_share([together[0] for together in shared], cluster.num_cpus)
        size = group_size(len(items), cluster.num_cpus, stages[0].batch_size)
        rows = [{"group": cloudpickle.dumps(chunk)} for chunk in chunks(items, size)]
        with _row_per_block():
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
            for together in shared:
                dataset = self._with_stages(dataset, worker_class, together, cluster, share)
            return [item for row in dataset.iter_rows() for item in cloudpickle.loads(row["group"])]

    def _with_stages(
        self,
        dataset: Any,
        worker_class: type[DataStage],
        stages: Sequence[PlannedStage],
        cluster: Cluster,
        share: float,
    ) -> Any:
        """Add stages that run in the same workers."""
        stage = stages[0]
        # Ray Data has no other option for the number of restarts. It warns that Ray 2.64 removes this one.
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=RayDeprecationWarning)
        most = stage.max_num_workers(cluster, self._max_workers)
        least = most if stage.job.stage.num_workers is not None else 1
        return dataset.map_batches(
            worker_class,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=[each.constructor_arguments for each in stages],
            num_cpus=stage.num_cpus * share,
            num_gpus=stage.num_gpus or None,
            runtime_env=stage.runtime_env or None,
            max_restarts=self._max_deaths,
            max_task_retries=-1,  # limited by max_restarts; Ray counts every attempt to reach a dead node
        )


def _place(stage: PlannedStage) -> Hashable:
    """Return a value that is equal for stages that may share their workers. GPUs and numbers of workers are exact."""
    if stage.num_gpus or stage.job.stage.num_workers is not None or stage.python_id is None:
        return stage.job.index
    return cloudpickle.dumps((stage.num_cpus, stage.runtime_env, stage.env_vars, stage.python_id))


def _release_workers(error: BaseException, worker_class: type[DataStage]) -> None:
    """Make the workers of a failed Ray Data job end and return their CPUs.

    Ray Data ends a worker by dropping its own reference; the worker then tears its stages down. After an error, the
    local variables of the functions that raised it, and reference cycles, still refer to workers. These would hold
    their CPUs until Python happens to collect the cycles, or as long as somebody keeps the error. So these references
    are dropped first.

    Ray's core sometimes keeps a callback that refers to a worker, which no collection finds. Such a worker is killed,
    without a teardown.
    """
    for cause in causes(error):
        for called, _ in traceback.walk_tb(cause.__traceback__):
            frame: FrameType | None = called
            while frame is not None:  # Ray Data cuts tracebacks short, but a frame refers to its callers
                if frame.f_code.co_filename.startswith(_SOURCES):
                    with suppress(RuntimeError):  # it is still running
                        frame.clear()
                frame = frame.f_back
    gc.collect()
    for remaining in gc.get_objects():
        if isinstance(remaining, ActorHandle) and f"({worker_class.__name__})" in repr(remaining):
            ray.kill(remaining)


@contextmanager
def _row_per_block() -> Iterator[None]:
    """Make data sets that are created in this context put every row into a separate block."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = 1, False
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before
