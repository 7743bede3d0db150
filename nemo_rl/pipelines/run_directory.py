"""Stores the state of a run, so that it can be resumed. Without a run directory, the state is temporary.

::

    <run_dir>/
      run.json         name, fingerprint, attempts, state
      sources.pickle   the initial tasks of the run and their digests
      spool/NN/        the outcome of every task of segment NN, see `spool`
      failed/<stage>/  tasks that were set aside, see `failures`
      progress/NNN/    the counts of every worker, see `progress`
      stages.json      the counts per stage, written when the run ends
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
from nemo_rl.pipelines.fingerprint import run_fingerprint, task_digest
from nemo_rl.pipelines.progress import read_counts
from nemo_rl.pipelines.runner import counts_directory
from nemo_rl.pipelines.spool import dumps, freeze
from nemo_rl.pipelines.stage import AnyStage
from nemo_rl.pipelines.tasks import Task
from nemo_rl.pipelines.trusted_files import read_trusted
from nemo_rl.utils.files import write_atomically

RECORD_FILE = "run.json"
_SOURCES = "sources.pickle"
STAGES_FILE = "stages.json"


class RunDirectory:
    """Manages the directory of one run. One process holds it at a time; open it with `opened`.

    Attributes:
        path: the directory.
        resumable: whether the directory outlives the run.
        attempt: number of the attempt. Each call of `Pipeline.run` starts one, and so does each repetition after
            workers died.
        is_resumed: whether an earlier call used the directory.
        run_id: unique id of the run.
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
        """Open and lock the directory of a run. With `path=None`, use a temporary directory.

        Args:
            path: the directory; created if it is missing.
            name: name of the pipeline.
            stages: the expanded stages.
            executor_kind: "stage by stage" or "streaming".
            fields: the `runtime_env` of each stage, see `run_fingerprint`.

        Raises:
            ResumeError: another run holds the directory, or it belongs to other stages or another kind of executor.
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
            record = _record(root, name, run_fingerprint(name, stages, fields), executor_kind)
            directory = RunDirectory(root, True, record["attempts"] + 1, record)
            freeze(root / "spool", directory.attempt)
            try:
                yield directory
            except BaseException:
                directory._close("failed", stages)
                raise
            directory._close("finished", stages)

    def begin(self) -> None:
        """Record the attempt. From now on, another call with this directory resumes this run."""
        if self.resumable:
            self._record = {**self._record, "attempts": self.attempt, "state": "running"}
            _write_json(self.path / RECORD_FILE, self._record)
            self._begun = True

    def next_attempt(self) -> None:
        """Start another attempt. What workers of earlier attempts still write is ignored."""
        self.attempt += 1
        freeze(self.path / "spool", self.attempt)
        self.begin()

    def sources(self, tasks: list[Task[Any]]) -> list[Task[Any]]:
        """Return the initial tasks of the first attempt, which stores them.

        Raises:
            ResumeError: `tasks`, the initial tasks of this attempt, differ from them.
        """
        if not self.resumable:
            return tasks
        path = self.path / _SOURCES
        digests = [task_digest(task) for task in tasks]
        if not path.exists():
            write_atomically(path, dumps((digests, tasks)), private=True)
            return tasks
        old_digests: list[str]
        old_tasks: list[Task[Any]]
        content = read_trusted(path)
        if not content.endswith(pickle.STOP):
            raise ResumeError(f"{path} is incomplete ({len(content)} bytes). Start a new run in another run_dir.")
        old_digests, old_tasks = pickle.loads(content)
        if old_digests != digests:
            shorter = min(len(old_digests), len(digests))
            changed = next((i for i, (a, b) in enumerate(zip(old_digests, digests)) if a != b), shorter)
            raise ResumeError(
                f"the inputs of the run in {self.path} have changed since it was started (first difference: input "
                f"{changed} of {len(old_digests)}, now {len(digests)}). Start a new run in another run_dir."
            )
        return old_tasks

    def clear_segment(self, directory: Path) -> None:
        """Delete what an unfinished attempt wrote for a segment that runs as a whole."""
        shutil.rmtree(directory, ignore_errors=True)

    def _close(self, state: str, stages: Sequence[AnyStage]) -> None:
        """Write the counts of all stages and the final state of the run."""
        if not self._begun:
            return
        counts = [
            {"stage": stage.name, **asdict(read_counts(counts_directory(self.path, index)))}
            for index, stage in enumerate(stages)
        ]
        _write_json(self.path / STAGES_FILE, counts)
        _write_json(self.path / RECORD_FILE, {**self._record, "state": state, "ended": time.time()})


def _record(root: Path, name: str, digest: str, executor_kind: str) -> dict[str, Any]:
    path = root / RECORD_FILE
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
            raise ResumeError(f"{path} cannot be read: {error}. Start a new run in another run_dir.") from error
        if record.get("fingerprint") != digest:
            raise ResumeError(
                f"the run directory {root} holds a run of the pipeline {record.get('name')!r} with other stages or "
                "other stage options. Use another run_dir, or remove this one."
            )
        if record["executor"] != executor_kind:
            raise ResumeError(
                f"the run in {root} was started on an executor that is {record['executor']}; this one is "
                f"{executor_kind}. Use an executor of the same kind, or another run_dir."
            )
    return record


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=1))
