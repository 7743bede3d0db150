"""Stores tasks that failed, with their input and traceback."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl.errors import PipelineError, ResumeError
from nemo_rl.pipelines.spool import dumps
from nemo_rl.pipelines.tasks import Task
from nemo_rl.pipelines.trusted_files import read_trusted
from nemo_rl.utils.files import write_atomically

logger = logging.getLogger(__name__)

FAILED_DIR = "failed"
_MAX_ERROR_CHARS = 200
_RECORDS = "*/*.json"
_RECORD_FILES = "*/*.records.jsonl"


@dataclass(frozen=True)
class FailedTask:
    """Describes one task that was set aside.

    Attributes:
        stage: name of the stage that failed.
        task_id: id of the stage's input.
        lineage: position in the run's input that the task came from.
        error: class and message of the exception.
        traceback: its traceback as text.
        attempts: how often the task was tried.
        path: JSON file with these fields. The pickled task is beside it.
    """

    stage: str
    task_id: str
    lineage: str
    error: str
    traceback: str
    attempts: int
    path: Path

    def load(self) -> Task[Any]:
        """Load the stage's input, for example to retry it with `Pipeline.run(initial_tasks=...)`.

        Raises:
            PipelineError: another user could have written the file, or it is incomplete.
        """
        path = self.path.with_suffix(".task")
        content = read_trusted(path)
        if not content.endswith(pickle.STOP):
            raise PipelineError(f"{path} is incomplete ({len(content)} bytes): the task cannot be loaded")
        return pickle.loads(content)


def write_failure(directory: Path, record: Mapping[str, Any], task: Task[Any], place: Sequence[int]) -> Path:
    """Write a failure to `directory/<stage>`: first the task, then the record. Returns the record's path.

    Args:
        directory: the run's `failed` directory.
        record: the fields of `FailedTask`.
        task: the stage's input.
        place: the segment's number, followed by the task's key in it.
    """
    path = stage_directory(directory, record["stage"]) / f"{record['lineage']}.json"
    write_atomically(path.with_suffix(".task"), dumps(task), private=True)
    write_atomically(path, json.dumps({**record, "place": list(place)}, ensure_ascii=False, indent=1))
    return path


def withdraw_failures(directory: Path, segment: int, removed_keys: Callable[[], Set[tuple[int, ...]]]) -> None:
    """Delete the failures of a segment whose tasks succeeded later, in another attempt or on another worker.

    Args:
        directory: the run's `failed` directory.
        segment: the segment's number.
        removed_keys: returns the keys of the tasks that are not in the segment's result.
    """
    recorded = [(path, tuple(content["place"])) for path, content in _contents(directory)]
    in_segment = [(path, key) for path, (number, *key) in recorded if number == segment]
    removed = removed_keys() if in_segment else set()
    for path, key in in_segment:
        if tuple(key) not in removed:
            path.unlink()
            path.with_suffix(".task").unlink(missing_ok=True)


def write_records(directory: Path, stage: str, lineages: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Path:
    """Write records that a stage set aside while its task continued, such as broken lines of a file.

    Args:
        directory: the run's `failed` directory.
        stage: name of the stage.
        lineages: lineages of the tasks of one call. They name the file, so each call has its own.
        records: JSON objects.
    """
    name = lineages[0]
    if len(lineages) > 1:
        name += f"+{len(lineages) - 1}-" + hashlib.sha256("\n".join(lineages).encode()).hexdigest()[:8]
    path = stage_directory(directory, stage) / f"{name}.records.jsonl"
    lines = [json.dumps(dict(record), ensure_ascii=False, default=str) + "\n" for record in records]
    write_atomically(path, "".join(lines))
    return path


def failed_tasks(run_dir: str | os.PathLike[str]) -> list[FailedTask]:
    """Return the tasks that a run set aside.

    Raises:
        ResumeError: `run_dir` does not exist.

    Example::

        failed = failed_tasks("results/curation")
        for task in failed:
            print(task.stage, task.task_id, task.error)
        Pipeline("retry", stages=[...]).run(initial_tasks=[task.load() for task in failed])
    """
    root = Path(run_dir)
    if not root.is_dir():
        raise ResumeError(f"{root} is not a run directory: it does not exist")
    return list(_read(root / FAILED_DIR))


def set_aside_summary(run_dir: Path) -> str:
    """Say in one sentence what a run set aside, per stage, with the first error of each; empty if it is nothing."""
    directory = run_dir / FAILED_DIR
    by_stage: dict[str, list[FailedTask]] = {}
    for task in _read(directory):
        by_stage.setdefault(task.stage, []).append(task)
    parts = [
        f"{len(tasks)} of stage {stage!r} ({tasks[0].error.partition(chr(10))[0][:_MAX_ERROR_CHARS]})"
        for stage, tasks in by_stage.items()
    ]
    sentences = []
    if parts:
        num_tasks = sum(map(len, by_stage.values()))
        sentences.append(f"{num_tasks} tasks failed and were set aside in {directory}: {', '.join(parts)}")
    records: dict[str, int] = {}
    for path in sorted(directory.glob(_RECORD_FILES)):
        with open(path, "rb") as file:
            records[path.parent.name] = records.get(path.parent.name, 0) + sum(1 for _ in file)
    if records:
        counts = ", ".join(f"{count} of stage {stage!r}" for stage, count in records.items())
        sentences.append(f"{sum(records.values())} records were set aside in {directory}: {counts}")
    return "; ".join(sentences)


def stage_directory(directory: Path, stage: str) -> Path:
    """Return the directory of a stage's failures."""
    return directory / re.sub(r"[^\w.-]+", "_", stage)


def _read(directory: Path) -> Iterator[FailedTask]:
    for path, content in _contents(directory):
        del content["place"]
        yield FailedTask(**content, path=path)


def _contents(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the records that are complete. A power failure may leave a file with zeros or a part of its content."""
    for path in sorted(directory.glob(_RECORDS)):
        try:
            yield path, json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            logger.warning("the record of a failed task %s cannot be read: %s", path, error)
