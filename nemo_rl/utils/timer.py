"""Where the time goes: seconds per named phase of a step, and a timeline of a job's start.

A `Timer` belongs to one thread. A `Timeline` may be used by several threads; other processes' events are added with
their own wall-clock stamps.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Timer:
    """Sums up the wall-clock seconds spent in named phases; the same phase may be entered many times."""

    _seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block to `name`, also when it raises. Blocks may be nested."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Seconds per phase since the last `reset`, in the order in which the phases first ended."""
        return dict(self._seconds)

    def reset(self) -> None:
        """Forget all phases."""
        self._seconds.clear()


@dataclass(frozen=True)
class TimelineEvent:
    """Something that took time while a job started.

    Attributes:
        name: what was done ("import torch", "build BASE").
        process: who did it ("driver", "policy-0").
        node: host name.
        start, end: Unix time in seconds.
    """

    name: str
    process: str
    node: str
    start: float
    end: float


@dataclass
class Timeline:
    """Events of a job's start, from any thread."""

    events: list[TimelineEvent] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def event(self, name: str, process: str = "driver") -> Iterator[None]:
        """Record the block as one event, also when it raises."""
        started = time.time()
        try:
            yield
        finally:
            self.add(TimelineEvent(name, process, os.uname().nodename, started, time.time()))

    def add(self, event: TimelineEvent) -> None:
        """Add an event that was measured elsewhere."""
        with self._lock:
            self.events.append(event)

    def write(self, path: Path) -> None:
        """Write one JSON object per event, ordered by start, atomically."""
        partial = path.with_name(f".{path.name}.partial")
        with self._lock:
            lines = [json.dumps(asdict(event)) for event in sorted(self.events, key=lambda event: event.start)]
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        partial.replace(path)
