"""Runs a pipeline once, from its checks to its results. The diagram in `pipeline` shows the steps."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from nemo_rl.distributed.cluster.session import init_ray
from nemo_rl.distributed.futures import WORKER_DEATHS
from nemo_rl.errors import PipelineError, StageError
from nemo_rl.observability.activities import Activity, activity
from nemo_rl.pipelines.executors.actor_pool import gather
from nemo_rl.pipelines.executors.base import Cluster, Executor, PlannedStage, WorkersDied, stage_error
from nemo_rl.pipelines.failures import FAILED_DIR, set_aside_summary, withdraw_failures
from nemo_rl.pipelines.items import Item, key_text
from nemo_rl.pipelines.planning import checked_cluster, checked_stages, cluster_totals, planned_stages
from nemo_rl.pipelines.progress import ProgressListener, ProgressMonitor
from nemo_rl.pipelines.run_directory import RunDirectory
from nemo_rl.pipelines.runner import OnFailure, StageJob, StageRunner, counts_directory, spool_directory
from nemo_rl.pipelines.spool import Spool, SpooledTask, SpoolWriter, sync
from nemo_rl.pipelines.stage import AnyStage, GatherStage
from nemo_rl.pipelines.tasks import Task
from nemo_rl.utils.files import write_atomically

logger = logging.getLogger(__name__)

# File in the spool of a finished segment. Holds the number of its sources.
_COMPLETE = "complete"
_MAX_GATHER_ATTEMPTS = 2
# Consecutive attempts in which workers die and no further input is finished.
_MAX_ATTEMPTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class RunRequest:
    """Holds the arguments of one run. See `Pipeline` and `Pipeline.run`; `stages` are expanded."""

    name: str
    stages: list[AnyStage]
    runtime_env: Mapping[str, Any] | None
    executor: Executor
    run_dir: str | os.PathLike[str] | None
    on_failure: OnFailure
    max_retries: int
    progress: ProgressListener | None


def run_pipeline(request: RunRequest, tasks: list[Task[Any]]) -> list[Task[Any]]:
    """Run the pipeline over `tasks`. See `Pipeline.run`."""
    if not tasks:
        return []
    fields = checked_stages(request.stages, tasks, request.runtime_env)
    # A resumed run must have the same segments, which depend on the kind of executor.
    kind = "stage by stage" if getattr(request.executor, "stage_by_stage", False) else "streaming"
    with RunDirectory.opened(request.run_dir, request.name, request.stages, kind, fields) as directory:
        for stage in request.stages:
            stage.prepare(directory.is_resumed)
        directory.begin()
        with activity(f"pipeline {request.name}") as running:
            results = _Run(request, fields, directory, running).results(tasks)
            running.result = f"{len(results)} results"
        if summary := set_aside_summary(directory.path):
            logger.warning("pipeline %s: %s", request.name, summary)
        return results


class _Run:
    """Runs the segments of a request, with the state that a run directory holds."""

    def __init__(
        self, request: RunRequest, fields: list[dict[str, Any]], directory: RunDirectory, running: Activity
    ) -> None:
        self._request = request
        self._running = running
        self._stages = request.stages
        self._fields = fields
        self._executor = request.executor
        self._directory = directory

    def results(self, tasks: list[Task[Any]]) -> list[Task[Any]]:
        """Run every segment that is not finished."""
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
        """Return the segments: indices of consecutive stages that an executor runs together.

        A gathering stage is a segment by itself. An executor that runs stage by stage finishes no input before the last
        stage runs. In a resumable run, each of its stages is therefore a segment, whose results are stored.
        """
        indices = range(start, len(self._stages))
        if self._directory.resumable and getattr(self._executor, "stage_by_stage", False):
            return [[index] for index in indices]
        marked = [(i if isinstance(self._stages[i], GatherStage) else -1, i) for i in indices]
        return [[index for _, index in group] for _, group in groupby(marked, key=lambda pair: pair[0])]

    def _run_in_driver(self, index: int, tasks: list[Task[Any]]) -> list[Task[Any]]:
        self._running.phase(f"running stage {self._stages[index].name!r} in the driver")
        # These stages run in every attempt, and only the counts of the last attempt are kept.
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
            max_retries=self._request.max_retries,
            on_failure=on_failure,
            spools=spools,
            is_last=is_last,
            num_cpus=num_cpus,
        )

    # --- segments -----------------------------------------------------------------------------------------------------

    def _spools(self, number: int, segments: list[list[int]]) -> bool:
        """Return whether a segment's results go to disk: in a resumable run, and before and after a gathering stage."""
        following = segments[number] if number < len(segments) else []
        return self._directory.resumable or self._gathers(segments[number - 1]) or self._gathers(following)

    def _gathers(self, segment: list[int]) -> bool:
        return bool(segment) and isinstance(self._stages[segment[0]], GatherStage)

    def _finished(self, number: int) -> list[Item] | None:
        """Return the results of a segment that an earlier attempt finished, else None."""
        num_sources = self._num_sources(number) if self._directory.is_resumed else None
        if num_sources is None:
            return None
        spool_dir = spool_directory(self._directory.path, number)
        entries, missing = Spool.read(spool_dir).results(num_sources)
        if missing:  # such as after a power failure
            logger.warning("%d of %d inputs are missing in %s and run again", len(missing), num_sources, spool_dir)
            return None
        return _numbered([SpooledTask.from_entry(entry) for entry in entries])

    def _num_sources(self, number: int) -> int | None:
        """Return the number of sources of a finished segment, else None."""
        path = spool_directory(self._directory.path, number) / _COMPLETE
        try:
            return int(path.read_text())
        except (FileNotFoundError, ValueError):  # a power failure may leave an empty file
            return None

    def _finish(self, number: int, num_sources: int) -> list[Item]:
        """Mark a segment as finished, and delete the results of the segment before it."""
        items = self._results(number, num_sources)
        spool_dir = spool_directory(self._directory.path, number)
        sync(spool_dir)  # before the only other copy of the work, the results of the segment before, is deleted
        withdraw_failures(
            self._directory.path / FAILED_DIR, number, lambda: Spool.read(spool_dir).removed_keys(num_sources)
        )
        write_atomically(spool_dir / _COMPLETE, str(num_sources))
        self._directory.clear_segment(spool_directory(self._directory.path, number - 1))
        return items

    def _results(self, number: int, num_sources: int) -> list[Item]:
        """Read a segment's results. Raises `PipelineError` when a source is not accounted for."""
        spool_dir = spool_directory(self._directory.path, number)
        entries, missing = Spool.read(spool_dir).results(num_sources)
        if missing:
            raise PipelineError(
                f"{len(missing)} of {num_sources} inputs are not accounted for in {spool_dir}. If workers run on "
                "other nodes, Pipeline.run(run_dir=...) must be on a file system that all nodes share. Otherwise run "
                "the pipeline again to resume it."
            )
        return _numbered([SpooledTask.from_entry(entry) for entry in entries])

    def _run_segments(self, segments: list[list[int]], first: int, items: list[Item]) -> list[Item]:
        init_ray()
        cluster = cluster_totals()
        indices = [index for segment in segments[first - 1 :] for index in segment]
        resources = checked_cluster([self._stages[index] for index in indices])
        self._check_capacity(segments[first - 1 :], dict(zip(indices, resources)), cluster)
        jobs = []
        for number, segment in enumerate(segments[first - 1 :], start=first):
            jobs += [
                self._job(
                    index,
                    number,
                    spools=self._spools(number, segments),
                    is_last=index == segment[-1],
                    num_cpus=cluster.num_cpus,
                    on_failure=self._request.on_failure,
                )
                for index in segment
            ]
        self._running.phase(f"preparing {len(indices)} stages")
        planned = dict(zip(indices, planned_stages(jobs, [self._fields[index] for index in indices], resources)))
        counts_dirs = [(self._stages[index].name, counts_directory(self._directory.path, index)) for index in indices]
        with ProgressMonitor(counts_dirs, self._request.progress, pipeline=self._request.name):
            for number, segment in enumerate(segments[first - 1 :], start=first):
                if not items:
                    break
                stages = [planned[index] for index in segment]
                names = ", ".join(stage.name for stage in stages)
                self._running.phase(f"running {names} over {len(items)} tasks")
                if self._gathers(segment):
                    items = self._gather(number, stages[0], items, cluster)
                else:
                    items = self._run_segment(number, stages, items, cluster)
        return items

    def _check_capacity(
        self, segments: list[list[int]], wanted: dict[int, tuple[float, float]], cluster: Cluster
    ) -> None:
        """Let an executor that runs several stages at once check the cluster before the first segment starts."""
        check = getattr(self._executor, "check_capacity", None)
        if check is None:
            return
        for segment in segments:
            if not self._gathers(segment):
                check([(self._stages[index], wanted[index]) for index in segment], cluster)

    def _run_segment(self, number: int, stages: list[PlannedStage], items: list[Item], cluster: Cluster) -> list[Item]:
        """Run the stages over the unfinished inputs. If workers die, run them again over what is still unfinished."""
        spools = stages[0].job.spools
        waiting = self._unfinished(number, items) if spools else items
        num_without_progress = 0
        while True:
            try:
                results = self._executor.run(self._for_this_attempt(stages), waiting, cluster)
                break
            except WorkersDied as died:
                self._directory.next_attempt()
                before, waiting = waiting, self._unfinished(number, items) if spools else items
                num_without_progress = num_without_progress + 1 if len(waiting) == len(before) else 0
                if num_without_progress == _MAX_ATTEMPTS_WITHOUT_PROGRESS:
                    raise died.error from died
                logger.warning("%s. %d of %d inputs run again", died.error, len(waiting), len(before))
        if spools:
            return self._finish(number, len(items))
        by_key = {item.key: item.task for item in results}
        return _numbered([by_key[key] for key in sorted(by_key)])

    def _unfinished(self, number: int, items: list[Item]) -> list[Item]:
        """Return the inputs that the spool of a segment does not account for."""
        _, missing = Spool.read(spool_directory(self._directory.path, number)).results(len(items))
        if len(missing) < len(items):
            logger.info("%d of %d inputs are already done", len(items) - len(missing), len(items))
        return [items[index] for index in missing]

    def _for_this_attempt(self, stages: Sequence[PlannedStage]) -> list[PlannedStage]:
        return [replace(stage, job=replace(stage.job, attempt=self._directory.attempt)) for stage in stages]

    def _spool_input(self, spool_dir: Path, items: list[Item]) -> int:
        """Write a run's input to the spool that a gathering stage reads. Replaces what a killed attempt wrote there."""
        self._directory.clear_segment(spool_dir)
        writer = SpoolWriter(spool_dir, self._directory.attempt)
        writer.write([], items)
        writer.close()
        write_atomically(spool_dir / _COMPLETE, str(len(items)))
        return len(items)

    def _gather(self, number: int, stage: PlannedStage, items: list[Item], cluster: Cluster) -> list[Item]:
        (stage,) = self._for_this_attempt([stage])
        spool_dir = spool_directory(self._directory.path, number)
        num_sources = self._num_sources(number - 1)
        if num_sources is None:  # the first segment: its input is not in a spool yet
            num_sources = self._spool_input(spool_directory(self._directory.path, number - 1), items)
        for attempt in range(1, _MAX_GATHER_ATTEMPTS + 1):
            self._directory.clear_segment(spool_dir)
            self._directory.clear_segment(stage.job.counts_directory)
            try:
                return self._finish(number, gather(stage, num_sources, cluster))
            except RayError as error:
                cause = stage_error(error)
                if cause is None and isinstance(error, WORKER_DEATHS) and attempt < _MAX_GATHER_ATTEMPTS:
                    logger.warning("the worker of stage %r died; the stage runs again: %s", stage.name, error)
                    continue
                text = f"stage {stage.name!r} failed: {error}"
                raise cause or StageError(text, stage=stage.name) from error
        raise AssertionError("unreachable")


def _sources(tasks: Sequence[Task[Any]]) -> list[Task[Any]]:
    """Return copies of the tasks with the lineage of this run. The caller's tasks may be results of another run."""
    result = []
    for index, task in enumerate(tasks):
        frozen = task.frozen()
        frozen = copy.copy(task) if frozen is task else frozen
        frozen._lineage = key_text((index,))
        result.append(frozen)
    return result


def _numbered(tasks: Sequence[Task[Any]]) -> list[Item]:
    return [Item(task, (index,)) for index, task in enumerate(tasks)]
