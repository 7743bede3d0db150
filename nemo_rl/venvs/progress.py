"""Progress of a build: phases and their durations, for live displays and the manifest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

PHASES: tuple[str, ...] = ("wait", "resolve", "fetch", "link", "compile", "check", "seal")


@dataclass(frozen=True)
class Progress:
    """Describes one event of one venv. Picklable.

    Attributes:
        venv: name of the venv.
        digest: digest of the venv; empty while it is resolved.
        phase: one of `PHASES`; in `wait` another process builds the same venv.
        state: `started`, `running` (with a detail), `done` or `failed`.
        seconds: duration of a phase that is done or has failed; else 0.
        detail: such as the package that is downloaded, or the process that holds the lock.
    """

    venv: str
    digest: str
    phase: str
    state: str
    seconds: float = 0.0
    detail: str = ""


ProgressCallback = Callable[[Progress], None]


class PhaseClock:
    """Times the consecutive phases of one venv and reports them."""

    def __init__(self, venv: str, callback: ProgressCallback | None) -> None:
        self.seconds: dict[str, float] = {}
        self.digest = ""
        self.phase = ""
        self._venv = venv
        self._callback = callback
        self._started_at = 0.0

    def start(self, phase: str, detail: str = "") -> None:
        """End the current phase, if any, and start `phase`."""
        self.end()
        self.phase, self._started_at = phase, time.monotonic()
        self._emit("started", detail=detail)

    def end(self, state: str = "done", detail: str = "") -> None:
        """End the current phase, if any."""
        if self.phase:
            seconds = time.monotonic() - self._started_at
            self.seconds[self.phase] = round(self.seconds.get(self.phase, 0.0) + seconds, 4)
            self._emit(state, seconds, detail)
            self.phase = ""

    def shift(self, source: str, target: str, seconds: float) -> None:
        """Move `seconds` of the duration of phase `source` to phase `target`."""
        seconds = min(seconds, self.seconds.get(source, 0.0))
        self.seconds[source] = round(self.seconds.get(source, 0.0) - seconds, 4)
        self.seconds[target] = round(self.seconds.get(target, 0.0) + seconds, 4)

    def report(self, detail: str) -> None:
        """Report a detail of the current phase."""
        if self.phase:
            self._emit("running", detail=detail)

    def _emit(self, state: str, seconds: float = 0.0, detail: str = "") -> None:
        if self._callback is not None:
            self._callback(Progress(self._venv, self.digest, self.phase, state, seconds, detail))
