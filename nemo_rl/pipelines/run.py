"""One run of a pipeline, from its checks to its results; see the picture at the top of `pipeline`."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from nemo_rl.distributed.cluster.session import init_ray
from nemo_rl.distributed.futures import WORKER_DEATHS
from nemo_rl.errors import PipelineError, StageError
from nemo_rl.pipelines.bootstrap import StageWorker
from nemo_rl.pipelines.executors.base import Cluster, Executor, PlannedStage, WorkersDied, stage_error
from nemo_rl.pipelines.failures import FAILED_DIR, failed_tasks, withdraw_failures
from nemo_rl.pipelines.items import Item, key_text
from nemo_rl.pipelines.planning import checked_cluster, checked_stages, cluster_totals, planned_stages
from nemo_rl.pipelines.progress import ProgressListener, ProgressMonitor
from nemo_rl.pipelines.run_directory import RunDirectory
from nemo_rl.pipelines.runner import OnFailure, StageJob, StageRunner, counts_directory, spool_directory
from nemo_rl.pipelines.spool import Spool, SpooledTask, SpoolWriter
from nemo_rl.pipelines.stage import AnyStage, GatherStage
from nemo_rl.pipelines.tasks import Task
from nemo_rl.utils.files import write_atomically

if TYPE_CHECKING:
    from nemo_rl.pipelines.pipeline import Pipeline

logger = logging.getLogger(__name__)

# In the spool of a segment that is done: how many sources it had.
_COMPLETE = "complete"
_MAX_GATHER_ATTEMPTS = 2
# So many times in a row may workers die before a single further input is done.
_MAX_VAIN_ATTEMPTS = 3


@dataclass(frozen=True)
class RunOptions:
    """See `Pipeline.run`."""

    run_dir: str | os.PathLike[str] | None
    on_failure: OnFailure
    max_retries: int
    progress: ProgressListener | None


def run_pipeline(
    pipeline: Pipeline,
    stages: list[AnyStage],
    executor: Executor | None,
    tasks: list[Task[Any]],
    options: RunOptions,
) -> list[Task[Any]]:
    """See `Pipeline.run`."""
    if not tasks:
        return []
    fields = checked_stages(stages, tasks, pipeline.runtime_env)
    executor = _default_executor() if executor is None else executor
    # The steps in which a run's results are kept must be the same when it is resumed.
    kind = "stage by stage" if getattr(executor, "stage_by_stage", False) else "streaming"
    with RunDirectory.opened(options.run_dir, pipeline.name, stages, kind, fields) as directory:
        for stage in stages:
            stage.prepare(directory.is_resumed)
        directory.begin()
        run = _Run(stages, fields, executor, directory, options)
        results = run.results(tasks)
        failed = failed_tasks(directory.path)
        if failed:
            logger.warning("%d tasks failed and were set aside in %s", len(failed), directory.path / FAILED_DIR)
        return results


def _default_executor() -> Executor:
    from nemo_rl.pipelines.executors.actor_pool import RayActorPoolExecutor

    return RayActorPoolExecutor()


class _Run:
    """The state of a run: where it is, and what goes into the next segment."""

    def __init__(
        self,
        stages: list[AnyStage],
        fields: list[dict[str, Any]],
        executor: Executor,
        directory: RunDirectory,
        options: RunOptions,
    ) -> None:
        self._stages = stages
        self._fields = fields
        self._executor = executor
        self._directory = directory
        self._options = options

    def results(self, tasks: list[Task[Any]]) -> list[Task[Any]]:
        """Run everything that is not done yet."""
        num_in_driver = sum(stage.runs_in_driver for stage in self._stages)
        for index in range(num_in_driver):
            tasks = self._run_in_driver(index, tasks)
        items = _numbered(self._directory.sources(_sources(tasks)))
        segments = self._segments(num_in_driver)
        num_done = 0
        for number in range(len(segments), 0, -1):
            finished = self._finished(number)
            if finished is not None:
                items, num_done = finished, number
                break
        if items and num_done < len(segments):
            items = self._run_segments(segments, num_done + 1, items)
        return [item.task.load() if isinstance(item.task, SpooledTask) else item.task for item in items]

    def _segments(self, start: int) -> list[list[int]]:
        """Consecutive stages that an executor runs together; a gathering stage is a segment of its own.

        An executor that runs one stage after another has no input through all stages before the last one runs. So that
        a run that is killed need not start anew, each stage is then a segment, whose results are kept.
        """
        indices = range(start, len(self._stages))
        if self._directory.resumable and getattr(self._executor, "stage_by_stage", False):
            return [[index] for index in indices]
        marked = [(i if isinstance(self._stages[i], GatherStage) else -1, i) for i in indices]
        return [[index for _, index in group] for _, group in groupby(marked, key=lambda pair: pair[0])]

    def _run_in_driver(self, index: int, tasks: list[Task[Any]]) -> list[Task[Any]]:
        # It runs in every attempt: only the last one counts.
        self._directory.clear_segment(counts_directory(self._directory.path, index))
        withdraw_failures(self._directory.path / FAILED_DIR, 0, set)
        runner = StageRunner(self._job(index, 0, spools=False, is_last=False, num_cpus=1.0, on_failure="stop"))
        runner.start()
        groups = list(runner.run(_numbered(_sources(tasks))))
        runner.close()
        return [item.task for group in groups for item in group]

    def _job(
        self, index: int, segment: int, *, spools: bool, is_last: bool, num_cpus: float, on_failure: OnFailure
    ) -> StageJob:
        return StageJob(
            stage=self._stages[index],
            directory=str(self._directory.path),
            run_id=self._directory.run_id,
            segment=segment,
            index=index,
            attempt=self._directory.attempt,
            max_retries=self._options.max_retries,
            on_failure=on_failure,
            spools=spools,
            is_last=is_last,
            num_cpus=num_cpus,
        )

    # --- segments -----------------------------------------------------------------------------------------------------

    def _spools(self, number: int, segments: list[list[int]]) -> bool:
        """Whether a segment's results go to disk: to resume the run, or for a gathering stage before or after."""
        following = segments[number] if number < len(segments) else []
        return self._directory.resumable or self._gathers(segments[number - 1]) or self._gathers(following)

    def _gathers(self, segment: list[int]) -> bool:
        return bool(segment) and isinstance(self._stages[segment[0]], GatherStage)

    def _finished(self, number: int) -> list[Item] | None:
        """The results of a segment that an earlier attempt finished; else None."""
        num_sources = self._num_sources(number) if self._directory.is_resumed else None
        return None if num_sources is None else self._results(number, num_sources)

    def _num_sources(self, number: int) -> int | None:
        """Of a segment that is done; else None."""
        path = spool_directory(self._directory.path, number) / _COMPLETE
        return int(path.read_text()) if path.exists() else None

    def _finish(self, number: int, num_sources: int) -> list[Item]:
        """Mark a segment as finished, and forget the one before it."""
        items = self._results(number, num_sources)
        place = spool_directory(self._directory.path, number)
        withdraw_failures(self._directory.path / FAILED_DIR, number, lambda: Spool.read(place).gone(num_sources))
        write_atomically(place / _COMPLETE, str(num_sources))
        self._directory.clear_segment(spool_directory(self._directory.path, number - 1))
        return items

    def _results(self, number: int, num_sources: int) -> list[Item]:
        """Raises `PipelineError` when a source is not accounted for."""
        place = spool_directory(self._directory.path, number)
        entries, missing = Spool.read(place).results(num_sources)
        if missing:
            raise PipelineError(
                f"{len(missing)} of {num_sources} inputs are not accounted for in {place}. If workers run on other "
                "nodes, Pipeline.run(run_dir=...) must be on a file system that all of them share; else run the "
                "pipeline again to go on."
            )
        return _numbered([SpooledTask.of(entry) for entry in entries])

    def _run_segments(self, segments: list[list[int]], first: int, items: list[Item]) -> list[Item]:
        init_ray()
        cluster = cluster_totals()
        indices = [index for segment in segments[first - 1 :] for index in segment]
        resources = checked_cluster([self._stages[index] for index in indices])
        self._check_room(segments[first - 1 :], dict(zip(indices, resources)), cluster)
        jobs = []
        for number, segment in enumerate(segments[first - 1 :], start=first):
            jobs += [
                self._job(
                    index,
                    number,
                    spools=self._spools(number, segments),
                    is_last=index == segment[-1],
                    num_cpus=cluster.num_cpus,
                    on_failure=self._options.on_failure,
                )
                for index in segment
            ]
        planned = dict(zip(indices, planned_stages(jobs, [self._fields[index] for index in indices], resources)))
        places = [(self._stages[index].name, counts_directory(self._directory.path, index)) for index in indices]
        with ProgressMonitor(places, self._options.progress):
            for number, segment in enumerate(segments[first - 1 :], start=first):
                if not items:
                    break
                stages = [planned[index] for index in segment]
                if self._gathers(segment):
                    items = self._gather(number, stages[0], items)
                else:
                    items = self._run_segment(number, stages, items, cluster)
        return items

    def _check_room(self, segments: list[list[int]], wanted: dict[int, tuple[float, float]], cluster: Cluster) -> None:
        """Ask an executor that runs several stages at once whether it can, before the first segment starts."""
        check = getattr(self._executor, "check_room", None)
        if check is None:
            return
        for segment in segments:
            if not self._gathers(segment):
                check([(self._stages[index], wanted[index]) for index in segment], cluster)

    def _run_segment(self, number: int, stages: list[PlannedStage], items: list[Item], cluster: Cluster) -> list[Item]:
        """Run the stages over what is not done, and again over what still is not when workers died."""
        spools = stages[0].job.spools
        waiting = self._waiting(number, items) if spools else items
        num_vain = 0
        while True:
            try:
                found = self._executor.run(self._of_this_attempt(stages), waiting, cluster)
                break
            except WorkersDied as died:
                self._directory.next_attempt()
                before, waiting = waiting, self._waiting(number, items) if spools else items
                num_vain = num_vain + 1 if len(waiting) == len(before) else 0
                if num_vain == _MAX_VAIN_ATTEMPTS:
                    raise died.error from died
                logger.warning("%s. %d of %d inputs run again", died.error, len(waiting), len(before))
        if spools:
            return self._finish(number, len(items))
        results = {item.key: item.task for item in found}
        return _numbered([results[key] for key in sorted(results)])

    def _waiting(self, number: int, items: list[Item]) -> list[Item]:
        """What the spool of a segment does not account for."""
        _, missing = Spool.read(spool_directory(self._directory.path, number)).results(len(items))
        if len(missing) < len(items):
            logger.info("%d of %d inputs were done before", len(items) - len(missing), len(items))
        return [items[index] for index in missing]

    def _of_this_attempt(self, stages: Sequence[PlannedStage]) -> list[PlannedStage]:
        return [replace(stage, job=replace(stage.job, attempt=self._directory.attempt)) for stage in stages]

    def _spool_input(self, place: Path, items: list[Item]) -> int:
        """Put a run's input where a gathering stage reads it; what an attempt that was killed left is made anew."""
        self._directory.clear_segment(place)
        writer = SpoolWriter(place, self._directory.attempt)
        writer.write([], items)
        writer.close()
        write_atomically(place / _COMPLETE, str(len(items)))
        return len(items)

    def _gather(self, number: int, stage: PlannedStage, items: list[Item]) -> list[Item]:
        (stage,) = self._of_this_attempt([stage])
        place = spool_directory(self._directory.path, number)
        num_sources = self._num_sources(number - 1)
        if num_sources is None:  # the first segment: its input is still here
            num_sources = self._spool_input(spool_directory(self._directory.path, number - 1), items)
        options: dict[str, Any] = {"num_cpus": stage.num_cpus, "num_gpus": stage.num_gpus}
        if stage.runtime_env:
            options["runtime_env"] = stage.runtime_env
        for attempt in range(1, _MAX_GATHER_ATTEMPTS + 1):
            self._directory.clear_segment(place)
            self._directory.clear_segment(stage.job.counts_directory)
            worker: Any = ray.remote(StageWorker).options(**options).remote(*stage.constructor_arguments)
            try:
                ray.get(worker.start.remote())
                num_gathered = ray.get(worker.gather.remote(num_sources))
                with contextlib.suppress(*WORKER_DEATHS):  # it exits by itself
                    ray.get(worker.close.remote())
                return self._finish(number, num_gathered)
            except RayError as error:
                ours = stage_error(error)
                if ours is None and isinstance(error, WORKER_DEATHS) and attempt < _MAX_GATHER_ATTEMPTS:
                    logger.warning("the worker of stage %r died, it runs again: %s", stage.name, error)
                    continue
                text = f"stage {stage.name!r} failed: {error}"
                raise ours or StageError(text, stage=stage.name) from error
            finally:
                ray.kill(worker)
        raise AssertionError("unreachable")


def _sources(tasks: Sequence[Task[Any]]) -> list[Task[Any]]:
    """What a run starts from, without touching what it was given: a task of another run has that one's lineage."""
    result = []
    for index, task in enumerate(tasks):
        frozen = task.frozen()
        frozen = copy.copy(task) if frozen is task else frozen
        frozen._lineage = key_text((index,))
        result.append(frozen)
    return result


def _numbered(tasks: Sequence[Task[Any]]) -> list[Item]:
    return [Item(task, (index,)) for index, task in enumerate(tasks)]
