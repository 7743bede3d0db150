"""Measures the phases of a step, and records a timeline of the start-up over all processes.

`Timer` sums durations within one process. `Timeline` appends intervals with wall-clock timestamps to a JSONL file,
which several processes and several starts of a run can share.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import psutil

from nemo_rl.utils.jsonl import append_text, read_jsonl
from nemo_rl.utils.processes import start_time

TIMELINE_FILE = "timeline.jsonl"
# The event with this name and zero duration ends the start-up.
FIRST_STEP = "first step"

DRIVER = "driver"


class Timer:
    """Sums the durations of named phases. Phases may be nested and repeated; a duration includes nested phases.

    By convention, the total is named "step" or "validation", and a part of a phase has a slash in its name
    ("generation/prefill"). Phases without a slash add up to the total. Not thread-safe.

    Example:
        >>> timer = Timer()
        >>> with timer.phase("generation"):
        ...     pass
        >>> list(timer.metrics())
        ['timing/generation_s']
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to `name`, also if the block raises.

        Raises:
            ValueError: the phase `name` is already open, so its time would count twice.
        """
        if name in self._open:
            raise ValueError(f"phase {name!r} is already open: {' > '.join(self._open)}")
        self._open[name] = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - self._open.pop(name)

    def seconds(self) -> dict[str, float]:
        """Return the seconds per phase since the last reset, in the order of their first end, without open phases."""
        return dict(self._seconds)

    def metrics(self) -> dict[str, float]:
        """Return the seconds per phase as metrics, named `timing/<phase>_s`."""
        return {f"timing/{name}_s": seconds for name, seconds in self._seconds.items()}

    def reset(self) -> None:
        """Reset the sums. Open phases continue and count from their start."""
        self._seconds.clear()


@dataclass(frozen=True)
class TimelineEvent:
    """Describes an interval of a process.

    Attributes:
        name: the activity, such as "import torch".
        process: "driver", or the name of a worker.
        node: host name.
        start: Unix time in seconds.
        end: Unix time in seconds; equal to `start` for an instant.
        life: number of the start of the run, counted from 1. A resumed run starts again.
        waits: whether the process only waited for other processes.
    """

    name: str
    process: str
    node: str
    start: float
    end: float
    life: int = 1
    waits: bool = False

    @property
    def duration_s(self) -> float:
        """Length of the interval in seconds."""
        return self.end - self.start


class PhaseListener(Protocol):
    """Receives the start and end of phases. May be called from several threads."""

    def phase_started(self, name: str, process: str) -> None:
        """Handle the start of a phase."""

    def phase_ended(self, name: str, process: str, duration_s: float) -> None:
        """Handle the end of a phase, with or without an error."""


class Timeline:
    """Records the timeline of a run in `directory/timeline.jsonl`. Used by the driver; thread-safe.

    Workers measure their phases as `TimelineEvent`s and return them to the driver, which adds them with `extend`. The
    timestamps of different hosts are comparable as far as their clocks agree. Concurrent threads of the driver use
    different process names ("driver", "driver: inputs").

    Example::

        timeline = Timeline(directory)
        with timeline.phase("load data"):
            dataset = load_dataset()
        timeline.mark_first_step()
    """

    def __init__(self, directory: Path, listener: PhaseListener | None = None) -> None:
        self._path = directory / TIMELINE_FILE
        self._listener = listener
        self.life = max((event.life for event in read_timeline(directory)), default=0) + 1

    @contextlib.contextmanager
    def phase(self, name: str, process: str = DRIVER, waits: bool = False) -> Iterator[None]:
        """Record the block as one event, also if it raises. See `TimelineEvent` for `waits`."""
        start = time.time()
        if self._listener is not None:
            self._listener.phase_started(name, process)
        try:
            yield
        finally:
            end = time.time()
            self.extend([TimelineEvent(name, process, socket.gethostname(), start, end, waits=waits)])
            if self._listener is not None:
                self._listener.phase_ended(name, process, end - start)

    def record(self, name: str, start: float, end: float, process: str = DRIVER, node: str | None = None) -> None:
        """Add one event of the current start."""
        self.extend([TimelineEvent(name, process, node or socket.gethostname(), start, end)])

    def mark_first_step(self) -> None:
        """Record the end of the start-up."""
        now = time.time()
        self.record(FIRST_STEP, now, now)

    def record_process_start(self) -> None:
        """Add the events before this call: `uv run` until Python started, and the imports until now."""
        started = start_time(os.getpid())
        with contextlib.suppress(psutil.Error, OSError):
            parent = psutil.Process().parent()
            if parent is not None and parent.name() == "uv":
                self.record("uv run", start_time(parent.pid), started)
        self.record("Python and imports", started, time.time())

    def extend(self, events: Iterable[TimelineEvent]) -> None:
        """Add events, for example of workers, to the current start."""
        lines = "".join(json.dumps({**asdict(event), "life": self.life}) + "\n" for event in events)
        append_text(self._path, lines)


def read_timeline(directory: Path) -> list[TimelineEvent]:
    """Read all events of a run directory, sorted by start. Incomplete lines of killed writers are skipped."""
    events = []
    for record in read_jsonl(directory / TIMELINE_FILE):
        with contextlib.suppress(TypeError):
            events.append(TimelineEvent(**record))  # type: ignore[arg-type]
    return sorted(events, key=lambda event: (event.life, event.start))
