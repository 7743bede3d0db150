"""Where a run keeps what it must not lose, or a scratch directory that ends with the run.

::

    <run_dir>/
      run.json         name, fingerprint, attempts, state
      sources.pickle   the tasks that the run started from, and what they are compared by
      spool/NN/        what became of every task, see `spool`; NN is the segment
      failed/<stage>/  tasks that were set aside, see `failures`
      progress/NNN/    counts of every worker, see `progress`
      stages.json      counts per stage, when the run ends
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_rl.errors import ResumeError
from nemo_rl.pipelines.content import fingerprint, identity
from nemo_rl.pipelines.own_files import read_own
from nemo_rl.pipelines.progress import read_counts
from nemo_rl.pipelines.runner import counts_directory
from nemo_rl.pipelines.spool import dumps, freeze
from nemo_rl.pipelines.stage import AnyStage
from nemo_rl.pipelines.tasks import Task
from nemo_rl.utils.files import write_atomically

_RECORD = "run.json"
_SOURCES = "sources.pickle"
STAGES_FILE = "stages.json"


class RunDirectory:
    """The directory of one run, held by one process at a time. Use `opened`.

    Attributes:
        attempt: counts calls of `Pipeline.run`, and from within one those in which dead workers' tasks ran again.
        is_resumed: whether an earlier call left something here.
    """

    def __init__(self, path: Path, resumable: bool, attempt: int, record: dict[str, Any]) -> None:
        self.path = path
        self.resumable = resumable
        self.attempt = attempt
        self.is_resumed = attempt > 1
        self.run_id: str = record.get("id") or uuid.uuid4().hex
        self._record = record
        self._begun = False

    @staticmethod
    @contextlib.contextmanager
    def opened(
        path: str | os.PathLike[str] | None,
        name: str,
        stages: Sequence[AnyStage],
        executor_kind: str = "",
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> Iterator[RunDirectory]:
        """Take a directory for a run; with None a scratch directory that is removed afterwards.

        Args:
            fields: each stage's `runtime_env`, see `fingerprint`.

        Raises:
            ResumeError: another run holds it, or it belongs to other stages or to another kind of executor.
        """
        if path is None:
            with tempfile.TemporaryDirectory(prefix="nemo_rl_pipeline_", ignore_cleanup_errors=True) as scratch:
                yield RunDirectory(Path(scratch), False, 1, {})
            return
        root = Path(path).absolute()
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = (root / ".lock").open("w")
        except OSError as error:
            raise ResumeError(f"the run directory {root} cannot be written: {error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ResumeError(f"the run directory {root} is in use by another run") from None
            record = _record(root, name, fingerprint(name, stages, fields), executor_kind)
            directory = RunDirectory(root, True, record["attempts"] + 1, record)
            freeze(root / "spool", directory.attempt)
            try:
                yield directory
            except BaseException:
                directory._close("failed", stages)
                raise
            directory._close("finished", stages)

    def begin(self) -> None:
        """From here on another run in this directory resumes this one."""
        if self.resumable:
            self._record = {**self._record, "attempts": self.attempt, "state": "running"}
            _write_json(self.path / _RECORD, self._record)
            self._begun = True

    def next_attempt(self) -> None:
        """Run on as another attempt: what workers of this one still write is not read."""
        self.attempt += 1
        freeze(self.path / "spool", self.attempt)
        self.begin()

    def sources(self, tasks: list[Task[Any]]) -> list[Task[Any]]:
        """The tasks that the first attempt started from; kept by it.

        Raises:
            ResumeError: `tasks`, what this attempt would start from, are others.
        """
        if not self.resumable:
            return tasks
        path = self.path / _SOURCES
        now = [identity(task) for task in tasks]
        if not path.exists():
            write_atomically(path, dumps((now, tasks)), private=True)
            return tasks
        before, kept = pickle.loads(read_own(path))
        if before != now:
            changed = next((i for i, (a, b) in enumerate(zip(before, now)) if a != b), min(len(before), len(now)))
            raise ResumeError(
                f"the inputs of the run in {self.path} have changed since it was started (first difference: input "
                f"{changed} of {len(before)}, now {len(now)}). Start a new run in another run_dir."
            )
        result: list[Task[Any]] = kept
        return result

    def clear_segment(self, directory: Path) -> None:
        """Forget what an attempt that did not finish wrote for a segment that is done as a whole."""
        shutil.rmtree(directory, ignore_errors=True)

    def _close(self, state: str, stages: Sequence[AnyStage]) -> None:
        """Write the counts of all stages, and how the run ended."""
        if not self._begun:
            return
        counts = [
            {"stage": stage.name, **asdict(read_counts(counts_directory(self.path, index)))}
            for index, stage in enumerate(stages)
        ]
        _write_json(self.path / STAGES_FILE, counts)
        _write_json(self.path / _RECORD, {**self._record, "state": state, "ended": time.time()})


def _record(root: Path, name: str, digest: str, executor_kind: str) -> dict[str, Any]:
    path = root / _RECORD
    record: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "name": name,
        "fingerprint": digest,
        "executor": executor_kind,
        "attempts": 0,
        "started": time.time(),
    }
    if path.exists():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResumeError(f"{path} cannot be read: {error}") from error
        if record.get("fingerprint") != digest:
            raise ResumeError(
                f"the run directory {root} holds a run of the pipeline {record.get('name')!r} with other stages or "
                "other options of a stage. Give another run_dir, or remove it."
            )
        if record["executor"] != executor_kind:
            raise ResumeError(
                f"the run in {root} was started on an executor that is {record['executor']}; this one is "
                f"{executor_kind}. Go on with an executor of the same kind, or give another run_dir."
            )
    return record


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=1))
