"""Runs a stage in its worker process. All executors use this code.

::

    group of tasks ──▶ per batch: check needs ─▶ process_batch ─▶ children, with keys ──▶ groups of tasks
                                     │ raised: run each task alone, with retries
                                     └─▶ failed/ (input, traceback), then continue or stop
    last stage of a segment with a spool: results are appended to the spool instead of being sent on
"""

from __future__ import annotations

import fcntl
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_rl.errors import DataError, StageError, StageInputError, StageOutputError, StageStartError
from nemo_rl.pipelines.failures import FAILED_DIR, write_failure, write_records
from nemo_rl.pipelines.items import Item, child_lineage, chunks, grouped, key_text
from nemo_rl.pipelines.progress import Counts, Dropped, WorkerCounts
from nemo_rl.pipelines.spool import Entry, Spool, SpooledTask, SpooledTasks, SpoolWriter
from nemo_rl.pipelines.stage import AnyStage, GatherStage, ProcessingStage
from nemo_rl.pipelines.tasks import DocumentBatch, StagePerf, Task
from nemo_rl.utils.files import write_atomically

OnFailure = Literal["stop", "set_aside"]
# A retry cannot succeed after these errors.
_NOT_RETRIED = (StageInputError, StageOutputError)


@dataclass(frozen=True)
class StageJob:
    """Describes a stage for its workers. Pickled by value, so it holds plain data and the stage only.

    Attributes:
        stage: the stage.
        directory: the run's directory. All nodes share it if it must outlive the run.
        run_id: unique id of the run, also among earlier runs in the same directory.
        segment: number of the segment.
        index: position of the stage in the pipeline.
        attempt: number of the attempt in the run's directory.
        max_retries: retries per task if the stage sets none.
        on_failure: what to do with a task that fails.
        spools: whether dropped tasks and the results of the last stage are recorded on disk.
        is_last: whether the stage is the last of its segment.
        num_cpus: CPUs of the cluster. They determine the size of task groups.
    """

    stage: AnyStage
    directory: str
    run_id: str
    segment: int
    index: int
    attempt: int
    max_retries: int
    on_failure: OnFailure
    spools: bool
    is_last: bool
    num_cpus: float

    @property
    def spool_directory(self) -> Path:
        return spool_directory(Path(self.directory), self.segment)

    @property
    def counts_directory(self) -> Path:
        return counts_directory(Path(self.directory), self.index)


def stop_file(job: StageJob) -> Path:
    """Return the file in which a worker stores the error that stops the run."""
    return Path(job.directory) / f"stopped-{job.attempt:04d}.pickle"


def spool_directory(run_dir: Path, segment: int) -> Path:
    """Return the directory of a segment's spool."""
    return run_dir / "spool" / f"{segment:02d}"


def counts_directory(run_dir: Path, index: int) -> Path:
    """Return the directory of the counts of a stage's workers."""
    return run_dir / "progress" / f"{index:03d}"


class _MergedError(Exception):
    """A batch returned results that cannot be assigned to its tasks. A resumable run does not support this."""


class StageRunner:
    """Runs one stage. Not thread-safe."""

    def __init__(self, job: StageJob) -> None:
        self._job = job
        self._stage = job.stage
        self._stage._reporter = self
        self._counts = WorkerCounts(job.counts_directory)
        self._spool = SpoolWriter(job.spool_directory, job.attempt)
        # Reported by the current call of the stage. Counted only if the call succeeds.
        self._records: list[Mapping[str, Any]] = []
        self._dropped: list[tuple[str, int, Sequence[Mapping[str, Any]]]] = []
        self._worker = f"{socket.gethostname()}:{os.getpid()}"

    def start(self) -> None:
        """Set the stage up. Raises `StageStartError` if that fails."""
        began = time.perf_counter()
        try:
            self._setup_on_node()
            self._stage.setup()
        except Exception as error:
            failure = StageStartError(
                f"stage {self._stage.name!r} could not be set up: {type(error).__name__}: {error}",
                stage=self._stage.name,
                traceback_text=traceback.format_exc(),
            )
            # Drop the cause: the driver's venv may not be able to import its class.
            raise self._record_stop(failure) from None
        self._counts.counts.setup_s = time.perf_counter() - began
        self._counts.save()

    def run(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Process a group of tasks and yield groups of results. Results that go to the spool are not yielded.

        Raises:
            StageError: a task failed, and `on_failure` is "stop".
        """
        yield from grouped(self._batches(items), len(items), self._job.num_cpus)
        self._counts.save()

    def gather(self, num_sources: int) -> int:
        """Run a `GatherStage` over the spool of the previous segment, and write its results to this segment's spool.

        Args:
            num_sources: number of sources of the previous segment. Its spool must account for all of them.

        Returns:
            The number of results.

        Raises:
            StageInputError: the spool does not account for every source.
        """
        assert isinstance(self._stage, GatherStage)
        previous = spool_directory(Path(self._job.directory), self._job.segment - 1)
        entries, missing = Spool.read(previous).results(num_sources)
        if missing:
            raise StageInputError(
                f"stage {self._stage.name!r}: {len(missing)} of {num_sources} inputs are not in {previous} on "
                f"{socket.gethostname()}. On several nodes the run directory (Pipeline.run(run_dir=...)) must be on a "
                "file system that all of them share.",
                stage=self._stage.name,
            )
        began = time.perf_counter()
        counts = self._counts.counts
        counts.tasks_in = len(entries)
        number = 0
        try:
            for number, task in enumerate(self._stage.process_all(_CountingTasks(entries, counts)), start=1):
                frozen = self._checked_output(task, None)
                counts.tasks_out, counts.items_out = number, counts.items_out + frozen.num_items
                key = (number - 1,)
                frozen._lineage = key_text(key)
                self._spool.write([], [Item(frozen, key)])
        except StageError:
            raise
        except Exception as error:
            raise self._stage_error(error, "", traceback.format_exc()) from None
        self._write_records(["all"])
        self._count_dropped()
        counts.busy_s = time.perf_counter() - began
        self._counts.save()
        self._spool.close()
        return number

    def close(self) -> None:
        """Tear the stage down."""
        self._stage.teardown()
        self._spool.close()
        self._counts.save()

    def withdraw_stop(self) -> None:
        """Delete the error that `start` has raised, because the run continues with another worker."""
        stop_file(self._job).unlink(missing_ok=True)

    # --- Reporter: called by the stage --------------------------------------------------------------------------------

    def dropped(self, reason: str, count: int, examples: Sequence[Mapping[str, Any]]) -> None:
        self._dropped.append((reason, count, examples))

    def set_aside(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._records += records

    # --- batches ------------------------------------------------------------------------------------------------------

    def _batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        for batch in chunks(items, self._stage.batch_size):
            loaded = [Item(i.task.load(), i.key) if isinstance(i.task, SpooledTask) else i for i in batch]
            outputs = self._process(loaded)
            if self._job.is_last and self._job.spools:
                self._spool.write([], outputs)
            else:
                yield outputs

    def _process(self, batch: list[Item]) -> list[Item]:
        counts = self._counts.counts
        counts.tasks_in += len(batch)
        counts.items_in += sum(item.task.num_items for item in batch)
        began = time.perf_counter()
        accepted = [item for item in batch if self._accepts(item)]
        outputs: list[Item] = []
        if len(accepted) == 1:
            outputs = self._process_one(accepted[0])
        elif accepted:
            try:
                outputs = self._call(accepted)
            except _MergedError as error:
                raise self._record_stop(self._output_error(str(error))) from None
            except Exception:
                self._discard_reports()
                # Run each task alone to find the one that fails.
                outputs = [output for item in accepted for output in self._process_one(item)]
        counts.busy_s += time.perf_counter() - began
        counts.tasks_out += len(outputs)
        counts.items_out += sum(output.task.num_items for output in outputs)
        return outputs

    def _process_one(self, item: Item) -> list[Item]:
        retries = self._job.max_retries if self._stage.max_retries is None else self._stage.max_retries
        for attempt in range(1, retries + 2):
            try:
                return self._call([item])
            except Exception as error:
                self._discard_reports()
                if attempt > retries or isinstance(error, _NOT_RETRIED):
                    self._fail(item, error, attempt)
                    break
        return []

    def _call(self, batch: list[Item]) -> list[Item]:
        tasks = []
        for item in batch:
            tasks.append(item.task.fresh())
        began = time.perf_counter()
        returned = self._stage.process_batch(tasks)
        perf = StagePerf(self._stage.name, time.perf_counter() - began, len(batch), self._worker)
        results = self._matched(batch, returned)
        outputs, entries = _children(results)
        for (inputs, returned_tasks), children in zip(results, outputs):
            for task, child in zip(returned_tasks, children):
                frozen = self._checked_output(task, child)
                frozen._stage_perf = [*inputs[0].task._stage_perf, perf]
                frozen._lineage = child_lineage(inputs[0], child.key)
                child.task = frozen
        self._write_records([item.task._lineage for item in batch])
        if self._job.spools:
            self._spool.write(entries)
        self._count_dropped()
        return [child for children in outputs for child in children]

    def _write_records(self, lineages: Sequence[str]) -> None:
        """Store the records that the stage set aside."""
        if self._records:
            write_records(Path(self._job.directory, FAILED_DIR), self._stage.name, lineages, self._records)
            self._records = []

    def _count_dropped(self) -> None:
        for reason, count, examples in self._dropped:
            self._counts.counts.dropped.setdefault(reason, Dropped()).add(count, examples)
        self._dropped = []

    def _discard_reports(self) -> None:
        """Discard what a stage reported before it raised. A retry reports it again."""
        self._records, self._dropped = [], []

    def _matched(self, batch: list[Item], returned: Any) -> list[tuple[list[Item], list[Any]]]:
        """Assign the returned tasks to the inputs that they came from."""
        if not isinstance(returned, list):
            raise self._output_error(f"process_batch returned {_shown(returned)}, not a list")
        if len(returned) == len(batch):
            return [([item], self._as_list(value)) for item, value in zip(batch, returned)]
        flat = [task for value in returned for task in self._as_list(value)]
        if self._job.spools and len(batch) > 1 and flat:
            raise _MergedError(
                f"process_batch returned {len(returned)} entries for {len(batch)} tasks. A run with a run_dir, or one "
                "with a GatherStage, needs one entry per task (a task, list or None). Use a GatherStage to merge tasks"
            )
        return [(batch, flat)]

    def _as_list(self, value: Any) -> list[Any]:
        if value is None:
            return []
        return value if isinstance(value, list) else [value]

    def _checked_output(self, task: Any, child: Item | None) -> Task[Any]:
        if not isinstance(task, Task):
            raise self._output_error(f"returned {_shown(task)}, not a task")
        try:
            # Copy: the stage may have returned the same object twice.
            return task.fresh().frozen()
        except DataError as error:
            raise self._output_error(str(error)) from error

    def _output_error(self, what: str) -> StageOutputError:
        return StageOutputError(f"stage {self._stage.name!r}: {what}", stage=self._stage.name)

    def _accepts(self, item: Item) -> bool:
        attributes, columns = self._stage.inputs()
        task = item.task
        missing = [name for name in attributes if not hasattr(task, name)]
        error = ""
        if missing:
            error = f"the task ({type(task).__name__} {task.task_id!r}) has no attribute {missing[0]!r}"
        elif columns and isinstance(task, DocumentBatch):
            missing = [name for name in columns if name not in task.columns]
            if missing:
                error = f"batch {task.task_id!r} has no column {missing[0]!r}; its columns are {task.columns}"
        if error:
            self._fail(item, StageInputError(f"stage {self._stage.name!r}: {error}"), 1)
        return not error

    def _fail(self, item: Item, error: Exception, attempts: int) -> None:
        text = "".join(traceback.format_exception(error))
        record = {
            "stage": self._stage.name,
            "task_id": item.task.task_id,
            "lineage": item.task._lineage,
            "error": f"{type(error).__name__}: {error}",
            "traceback": text,
            "attempts": attempts,
        }
        write_failure(Path(self._job.directory, FAILED_DIR), record, item.task, (self._job.segment, *item.key))
        self._counts.counts.failed += 1
        if self._job.on_failure == "stop":
            self._counts.save()
            raise self._record_stop(self._stage_error(error, item.task.task_id, text))
        if self._job.spools:
            self._spool.write([Entry("gone", item.key)])

    def _record_stop(self, error: StageError) -> StageError:
        """Write the error that stops the run to `stop_file`, where the driver looks for it, and return it."""
        write_atomically(stop_file(self._job), pickle.dumps(error), private=True)
        return error

    def _stage_error(self, error: Exception, task_id: str, text: str) -> StageError:
        if isinstance(error, StageError):
            error.stage, error.task_id, error.traceback_text = self._stage.name, task_id, text
            return error
        about = f" on task {task_id!r}" if task_id else ""
        return StageError(
            f"stage {self._stage.name!r} failed{about}: {type(error).__name__}: {error}\n{text}",
            stage=self._stage.name,
            task_id=task_id,
            traceback_text=text,
        )

    def _setup_on_node(self) -> None:
        if type(self._stage).setup_on_node is ProcessingStage.setup_on_node:
            return
        folder = Path(tempfile.gettempdir(), f"nemo_rl-{os.getuid()}", "stages")
        folder.mkdir(parents=True, exist_ok=True)
        marker = folder / f"{self._job.run_id}-{self._job.attempt}-{self._job.index}.done"
        with marker.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not marker.exists():
                self._stage.setup_on_node()
                marker.touch()


class _CountingTasks(SpooledTasks):
    """Counts the items of each task when the task is first read."""

    def __init__(self, entries: Sequence[Entry], counts: Counts) -> None:
        super().__init__(entries)
        self._counts = counts
        self._seen: set[int] = set()

    def __getitem__(self, index: Any) -> Any:
        result = super().__getitem__(index)
        if isinstance(index, int) and index not in self._seen:
            self._seen.add(index)
            self._counts.items_in += result.num_items
        return result


def _children(results: list[tuple[list[Item], list[Any]]]) -> tuple[list[list[Item]], list[Entry]]:
    """Assign keys to the returned tasks, and create the spool entries for their inputs."""
    outputs: list[list[Item]] = []
    entries: list[Entry] = []
    for inputs, tasks in results:
        first = inputs[0]
        if not tasks:
            entries += [Entry("gone", item.key) for item in inputs]
        elif len(tasks) > 1:
            entries.append(Entry("fan", first.key, len(tasks)))
        keys = [first.key] if len(tasks) == 1 else [(*first.key, index) for index in range(len(tasks))]
        outputs.append([Item(task, key) for task, key in zip(tasks, keys)])
    return outputs, entries


def _shown(value: Any) -> str:
    text = repr(value)
    return f"a {type(value).__name__} ({text if len(text) <= 80 else text[:77] + '...'})"
