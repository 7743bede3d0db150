"""Tasks that failed, kept with their input and traceback: nothing is lost, nothing is silently dropped."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl.errors import ResumeError
from nemo_rl.pipelines.own_files import read_own
from nemo_rl.pipelines.spool import dumps
from nemo_rl.pipelines.tasks import Task
from nemo_rl.utils.files import write_atomically

FAILED_DIR = "failed"
_RECORDS = "*/*.json"


@dataclass(frozen=True)
class FailedTask:
    """One task that was set aside.

    Attributes:
        stage, task_id, error, traceback: as they were.
        lineage: where in the run's input the task came from.
        attempts: how often it was tried.
        path: of the file with all this as JSON; the task itself lies beside it.
    """

    stage: str
    task_id: str
    lineage: str
    error: str
    traceback: str
    attempts: int
    path: Path

    def load(self) -> Task[Any]:
        """The stage's input, for another try with `Pipeline.run(initial_tasks=...)`.

        Raises:
            PipelineError: another user could have written it.
        """
        return pickle.loads(read_own(self.path.with_suffix(".task")))


def write_failure(directory: Path, record: Mapping[str, Any], task: Task[Any], place: Sequence[int]) -> Path:
    """Keep a failure below `directory/<stage>`; the record appears last, and only whole.

    Args:
        record: as `FailedTask`.
        place: the segment and the task's key in it.
    """
    path = stage_directory(directory, record["stage"]) / f"{record['lineage']}.json"
    write_atomically(path.with_suffix(".task"), dumps(task), private=True)
    write_atomically(path, json.dumps({**record, "place": list(place)}, ensure_ascii=False, indent=1))
    return path


def withdraw_failures(directory: Path, segment: int, gone: Callable[[], Set[tuple[int, ...]]]) -> None:
    """Forget failures of a segment whose tasks went through after all: in a later attempt, or on another worker.

    Args:
        gone: gives the keys of the tasks that are not in the segment's result.
    """
    recorded = [(path, tuple(_content(path)["place"])) for path in sorted(directory.glob(_RECORDS))]
    ours = [(path, key) for path, (number, *key) in recorded if number == segment]
    final = gone() if ours else set()
    for path, key in ours:
        if tuple(key) not in final:
            path.unlink()
            path.with_suffix(".task").unlink(missing_ok=True)


def write_records(directory: Path, stage: str, lineages: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Path:
    """Keep records of tasks that themselves go on, such as broken lines of a file.

    Args:
        lineages: of the tasks of one call; records of another call, with other tasks, are kept beside them.
    """
    name = lineages[0]
    if len(lineages) > 1:
        name += f"+{len(lineages) - 1}-" + hashlib.sha256("\n".join(lineages).encode()).hexdigest()[:8]
    path = stage_directory(directory, stage) / f"{name}.records.jsonl"
    lines = [json.dumps(dict(record), ensure_ascii=False, default=str) + "\n" for record in records]
    write_atomically(path, "".join(lines))
    return path


def failed_tasks(run_dir: str | os.PathLike[str]) -> list[FailedTask]:
    """The tasks that a run set aside.

    Raises:
        ResumeError: there is no such run directory.
    """
    root = Path(run_dir)
    if not root.is_dir():
        raise ResumeError(f"{root} is no run directory")
    return list(_read(root / FAILED_DIR))


def stage_directory(directory: Path, stage: str) -> Path:
    """Where a stage's failures are kept."""
    return directory / re.sub(r"[^\w.-]+", "_", stage)


def _read(directory: Path) -> Iterator[FailedTask]:
    for path in sorted(directory.glob(_RECORDS)):
        content = _content(path)
        del content["place"]
        yield FailedTask(**content, path=path)


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
