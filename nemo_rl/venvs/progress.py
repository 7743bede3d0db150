"""What a build is doing: phases with their times, for live displays and for the manifest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

PHASES: tuple[str, ...] = ("wait", "resolve", "fetch", "link", "compile", "check", "seal")


@dataclass(frozen=True)
class Progress:
    """One event of one venv. Picklable.

    Attributes:
        venv: the name that was asked for.
        digest: its identity; empty while resolving.
        phase: one of `PHASES`; `wait` is for another process that builds the same venv.
        state: `started`, `running` (something to tell), `done` or `failed`.
        seconds: that the phase took, when done or failed; else 0.
        detail: such as the package being downloaded, or who holds the lock.
    """

    venv: str
    digest: str
    phase: str
    state: str
    seconds: float = 0.0
    detail: str = ""


ProgressCallback = Callable[[Progress], None]


class PhaseClock:
    """Times the phases of one venv, one after another, and reports them."""

    def __init__(self, venv: str, report: ProgressCallback | None) -> None:
        self.seconds: dict[str, float] = {}
        self.digest = ""
        self.phase = ""
        self._venv = venv
        self._report = report
        self._since = 0.0

    def start(self, phase: str, detail: str = "") -> None:
        """End the running phase, if any, and start `phase`."""
        self.end()
        self.phase, self._since = phase, time.monotonic()
        self._emit("started", detail=detail)

    def end(self, state: str = "done", detail: str = "") -> None:
        if self.phase:
            seconds = time.monotonic() - self._since
            self.seconds[self.phase] = round(self.seconds.get(self.phase, 0.0) + seconds, 4)
            self._emit(state, seconds, detail)
            self.phase = ""

    def shift(self, source: str, target: str, seconds: float) -> None:
        """Count `seconds` that were timed as part of `source` as part of `target` instead."""
        seconds = min(seconds, self.seconds.get(source, 0.0))
        self.seconds[source] = round(self.seconds.get(source, 0.0) - seconds, 4)
        self.seconds[target] = round(self.seconds.get(target, 0.0) + seconds, 4)

    def tell(self, detail: str) -> None:
        """Say something about the running phase."""
        if self.phase:
            self._emit("running", detail=detail)

    def _emit(self, state: str, seconds: float = 0.0, detail: str = "") -> None:
        if self._report is not None:
            self._report(Progress(self._venv, self.digest, self.phase, state, seconds, detail))
