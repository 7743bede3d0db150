"""Tracks the progress of a run. Each worker writes its counts to a small file; readers add up the files.

This works the same for all executors, and the counts survive the death of workers and of the driver.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from nemo_rl.utils.files import write_atomically

if TYPE_CHECKING:
    from nemo_rl.observability.activities import Activity

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 5
_MAX_EXAMPLE_CHARS = 2000
_RECENT_S = 5.0


@dataclass
class Dropped:
    """Counts the documents that were dropped for one reason, with a few examples."""

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, count: int, examples: Sequence[Mapping[str, Any]]) -> None:
        """Add documents, and keep the first few as examples."""
        self.count += count
        for example in examples[: MAX_EXAMPLES - len(self.examples)]:
            self.examples.append({str(k): _shown(v) for k, v in example.items()})


def _shown(value: Any) -> Any:
    if isinstance(value, int | float | None):
        return value
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_EXAMPLE_CHARS else text[:_MAX_EXAMPLE_CHARS] + "…"


@dataclass
class Counts:
    """Counts the work of one worker, or of all workers of a stage.

    Tasks that run again, because a worker or the run died, are counted again.

    Attributes:
        tasks_in, items_in: tasks and items that the stage received.
        tasks_out, items_out: tasks and items that it returned.
        failed: tasks that were set aside.
        busy_s, setup_s: seconds spent in the stage's own code.
        first, last: Unix time of the first and the last group of tasks; 0 before the first group.
        num_workers: workers that have reported.
        dropped: reason -> dropped documents.
    """

    tasks_in: int = 0
    tasks_out: int = 0
    items_in: int = 0
    items_out: int = 0
    failed: int = 0
    busy_s: float = 0.0
    setup_s: float = 0.0
    first: float = 0.0
    last: float = 0.0
    num_workers: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Add another worker's counts."""
        for name in ("tasks_in", "tasks_out", "items_in", "items_out", "failed", "busy_s", "setup_s", "num_workers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first = min(filter(None, (self.first, other.first)), default=0.0)
        self.last = max(self.last, other.last)
        for reason, dropped in other.dropped.items():
            self.dropped.setdefault(reason, Dropped()).add(dropped.count, dropped.examples)

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Counts:
        """Create counts from the result of `asdict`."""
        dropped = {reason: Dropped(**value) for reason, value in plain.pop("dropped").items()}
        return Counts(**plain, dropped=dropped)


class WorkerCounts:
    """Stores this process's counts for one stage in a file."""

    def __init__(self, directory: Path) -> None:
        self.counts = Counts(num_workers=1)
        self._path = directory / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"

    def save(self) -> None:
        """Write the counts, unless the run's directory has been deleted since the last call."""
        if self.counts.last and not self._path.parent.is_dir():
            return
        now = time.time()
        self.counts.first = self.counts.first or now
        self.counts.last = now
        write_atomically(self._path, json.dumps(asdict(self.counts)), durable=False)


def read_counts(directory: Path) -> Counts:
    """Add up the counts of all workers of a stage. Files that a power failure left incomplete do not count."""
    total = Counts()
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(FileNotFoundError, ValueError):
            total.add(Counts.from_plain(json.loads(path.read_text(encoding="utf-8"))))
    return total


@dataclass(frozen=True)
class StageProgress:
    """Describes the progress of one stage at one moment.

    Attributes:
        stage: name of the stage.
        counts: the sum over its workers.
        queued: tasks that the previous stage has returned and this stage has not received; None for the first stage.
        tasks_per_s: rate over the last few seconds.
    """

    stage: str
    counts: Counts
    queued: int | None
    tasks_per_s: float

    def __str__(self) -> str:
        return f"{self.stage}: {self.summary}"

    @property
    def summary(self) -> str:
        """The counts as text."""
        c = self.counts
        queued = "" if self.queued is None else f", {self.queued} queued"
        return f"{c.tasks_in} tasks done, {self.tasks_per_s:.1f}/s{queued}, {c.failed} failed, {c.num_workers} workers"


ProgressListener = Callable[[list[StageProgress]], None]


class ProgressMonitor:
    """Reads the counts periodically while its `with` block runs, logs and shows them, and calls the listener.

    Args:
        stages: the name and the counts directory of each stage.
        listener: called with the progress of all stages.
        pipeline: name of the pipeline.
        interval_s: seconds between two reads.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, Path]],
        listener: ProgressListener | None,
        *,
        pipeline: str,
        interval_s: float = 2.0,
    ) -> None:
        self._pipeline = pipeline
        self._rows: dict[str, Activity] = {}
        self._stages = stages
        self._listener = listener
        self._interval_s = interval_s
        self._history: list[tuple[float, list[int]]] = []
        self._logged: dict[str, Counts] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pipeline progress", daemon=True)

    def __enter__(self) -> Self:
        from nemo_rl.observability.activities import SESSION  # workers import this module and need no rich

        for name, _ in self._stages:
            self._rows[name] = SESSION.begin(f"pipeline {self._pipeline}, stage {name}")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._report()
        from nemo_rl.observability.activities import SESSION

        for name, row in self._rows.items():
            counts = self._logged.get(name, Counts())
            result = f"{counts.tasks_in} tasks done, {counts.failed} failed"
            row.end(result, has_failed=error is not None, level=logging.DEBUG)
        SESSION.remove(*self._rows.values())

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._report()

    def _report(self) -> None:
        progress = self.now()
        for stage in progress:
            if self._logged.get(stage.stage, Counts()) != stage.counts:  # log only changes
                logger.info("%s", stage)
                self._logged[stage.stage] = stage.counts
                self._rows[stage.stage].update(stage.summary)
        if self._listener is not None:
            self._listener(progress)

    def now(self) -> list[StageProgress]:
        """Return the current progress of all stages."""
        counts = [read_counts(directory) for _, directory in self._stages]
        now = time.monotonic()
        self._history.append((now, [c.tasks_in for c in counts]))
        while len(self._history) > 2 and self._history[1][0] < now - _RECENT_S:
            self._history.pop(0)
        then, before = self._history[0]
        result = []
        for index, (name, _) in enumerate(self._stages):
            queued = None if index == 0 else max(0, counts[index - 1].tasks_out - counts[index].tasks_in)
            rate = (counts[index].tasks_in - before[index]) / (now - then) if now > then else 0.0
            result.append(StageProgress(name, counts[index], queued, rate))
        return result
