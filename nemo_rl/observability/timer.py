"""Where the time goes: phases of a step, and a time line of the start-up over all processes.

`Timer` sums durations within one process. `Timeline` keeps intervals with wall-clock stamps in a file, one JSON object
per line, which several processes and several lives of a run may append to.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import psutil

from nemo_rl.utils.jsonl import append_text, read_jsonl

TIMELINE_FILE = "timeline.jsonl"
# An event of this name, of no duration, ends the start-up.
FIRST_STEP = "first step"

DRIVER = "driver"


class Timer:
    """Sums the durations of named phases. Phases may be nested and repeated; a duration includes nested phases.

    By convention the whole is called "step" or "validation", and a part of another part is named with a slash
    ("generation/prefill"), so that the phases without a slash add up to the whole. Not for several threads.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent in the block for `name`, also when the block raises.

        Raises:
            ValueError: the phase `name` is already open, so that its time would count twice.
        """
        if name in self._open:
            raise ValueError(f"phase {name!r} is already open: {' > '.join(self._open)}")
        self._open[name] = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - self._open.pop(name)

    def seconds(self) -> dict[str, float]:
        """Seconds per phase since the last reset, in the order of their first end. Open phases are not in it."""
        return dict(self._seconds)

    def metrics(self) -> dict[str, float]:
        """The same under the names that metrics use: `timing/<phase>_s`."""
        return {f"timing/{name}_s": seconds for name, seconds in self._seconds.items()}

    def reset(self) -> None:
        """Forget the sums. Phases that are open go on and count from their start."""
        self._seconds.clear()


@dataclass(frozen=True)
class TimelineEvent:
    """One interval.

    Attributes:
        name: what was done, such as "import torch".
        process: who did it: "driver", or a worker's name.
        node: host name.
        start: seconds since the epoch.
        end: the same; equal to `start` for an instant.
        life: which life of the run, counted from 1: a resumed run starts up again.
        waits: the process did nothing itself, but waited for what other processes did meanwhile.
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
    """Is told about phases while they run; may be called from several threads."""

    def phase_started(self, name: str, process: str) -> None:
        """The phase begins."""

    def phase_ended(self, name: str, process: str, duration_s: float) -> None:
        """The phase is over, well or not."""


class Timeline:
    """The time line in `directory/timeline.jsonl`, as the driver writes it. Thread-safe.

    Workers measure their own phases as `TimelineEvent`s, hand them to the driver with their other results, and the
    driver adds them with `extend`. Stamps of other hosts are as good as their clocks agree. Driver threads that work
    side by side take different process names ("driver", "driver: inputs").
    """

    def __init__(self, directory: Path, listener: PhaseListener | None = None) -> None:
        self._path = directory / TIMELINE_FILE
        self._listener = listener
        self.life = max((event.life for event in read_timeline(directory)), default=0) + 1

    @contextlib.contextmanager
    def phase(self, name: str, process: str = DRIVER, waits: bool = False) -> Iterator[None]:
        """Record the block as one event, also when it raises. `waits`: see `TimelineEvent`."""
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
        """Add one event of this life."""
        self.extend([TimelineEvent(name, process, node or socket.gethostname(), start, end)])

    def mark_first_step(self) -> None:
        """The start-up is over."""
        now = time.time()
        self.record(FIRST_STEP, now, now)

    def record_process_start(self) -> None:
        """Add what happened before anybody could measure it: `uv run` until Python started, and imports until now."""
        process = psutil.Process()
        started = process.create_time()
        parent = process.parent()
        with contextlib.suppress(psutil.Error):
            if parent is not None and parent.name() == "uv":
                self.record("uv run", parent.create_time(), started)
        self.record("Python and imports", started, time.time())

    def extend(self, events: Iterable[TimelineEvent]) -> None:
        """Add events, of workers for instance, to this life."""
        lines = "".join(json.dumps({**asdict(event), "life": self.life}) + "\n" for event in events)
        append_text(self._path, lines)


def read_timeline(directory: Path) -> list[TimelineEvent]:
    """All events in the directory, oldest first; a line that a killed writer left incomplete is skipped."""
    events = []
    for record in read_jsonl(directory / TIMELINE_FILE):
        with contextlib.suppress(TypeError):
            events.append(TimelineEvent(**record))  # type: ignore[arg-type]
    return sorted(events, key=lambda event: (event.life, event.start))
