"""Shows on standard error what a session waits for: venv builds, starts of worker groups, uploads and pipelines.

::

    with activity("group policy") as starting:    on a terminal        elsewhere
        starting.phase("reserving 8 bundles")     a row of a live      group policy: reserving 8 bundles
        starting.phase("starting 8 workers")      table, and at the    group policy: starting 8 workers
        starting.result = "8 workers ready"       end this line:       group policy: 8 workers ready in 4.1 s

Every line is also a log record. Where logging shows these records on the console, as in jobs, the display is off, so
nothing appears twice. `NEMO_RL_PROGRESS` chooses the display.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nemo_rl import settings

logger = logging.getLogger(__name__)

_MAX_ROWS = 24
_REFRESH_PER_S = 8
# Without a terminal, a phase that lasts long repeats its line, with its current detail, after this time.
_REPEAT_S = 30.0


class Activity:
    """Something that takes time: a row on a terminal, lines elsewhere. Create it with `activity` or `Display.begin`.

    Attributes:
        name: what is done, such as "venv of my_package.MyWorker".
        place: the node; empty if it does not matter.
        current: the current phase.
        detail: what happens in the phase right now.
        result: the text of the last line.
        seconds: the total duration; None until the activity has ended.
        has_failed: whether it ended with a failure.
    """

    def __init__(self, display: Display, name: str, place: str = "", phase_level: int = logging.INFO) -> None:
        self.name = name
        self.place = place
        self.current = ""
        self.detail = ""
        self.result = "done"
        self.seconds: float | None = None
        self.has_failed = False
        self._display = display
        self._phase_level = phase_level
        self._start = self._last_line = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the activity began, or its total duration."""
        return time.monotonic() - self._start if self.seconds is None else self.seconds

    def phase(self, name: str, detail: str = "") -> None:
        """Begin the next phase."""
        self.current, self.detail = name, detail
        self._last_line = time.monotonic()
        self._display.line(self._text(), self._phase_level)

    def update(self, detail: str) -> None:
        """Show what happens in the current phase."""
        self.detail = detail
        if time.monotonic() - self._last_line > _REPEAT_S:
            self._last_line = time.monotonic()
            self._display.line(self._text(), logging.DEBUG)

    def end(self, result: str, *, has_failed: bool = False, level: int = logging.INFO) -> None:
        """End the activity with its last line, logged with this level. The row stays until `Display.remove`."""
        self.result, self.has_failed = result, has_failed
        self.seconds = time.monotonic() - self._start
        self._display.line(f"{self._title()}: {result} in {self.seconds:.1f} s", level, is_last=True)

    def _title(self) -> str:
        return f"{self.name} on {self.place}" if self.place else self.name

    def _text(self) -> str:
        return f"{self._title()}: {' '.join(filter(None, (self.current, self.detail)))}"


class Display:
    """Shows activities of all threads together.

    Args:
        console: where to show them. Default: standard error, as `NEMO_RL_PROGRESS` says.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._is_session = console is None
        self._console = console
        self._rows: list[Activity] = []
        self._live: Live | None = None
        self._lock = threading.Lock()

    @property
    def is_live(self) -> bool:
        """Whether a live table is on the terminal now."""
        return self._live is not None

    def begin(self, name: str, place: str = "", phase_level: int = logging.INFO) -> Activity:
        """Add a row. `phase_level` is the level of the log records of its phases."""
        row = Activity(self, name, place, phase_level)
        with self._lock:
            self._rows.append(row)
            if self._live is None and self._mode() == "live":
                self._live = self._start_live()
        return row

    def remove(self, *rows: Activity) -> None:
        """Remove rows. With the last row the live table disappears."""
        with self._lock:
            self._rows = [row for row in self._rows if row not in rows]
            if not self._rows and self._live is not None:
                self._live.stop()
                self._live = None

    def line(self, text: str, level: int, *, is_last: bool = False) -> None:
        """Log a line, and write it if the display shows lines. On a terminal it shows only the last of an activity."""
        logger.log(level, "%s", text)
        mode, live = self._mode(), self._live
        if live is not None and not is_last:
            live.refresh()
        if mode == "plain" or (mode == "live" and is_last):
            # A program must not fail because nobody reads its standard error; rich raises SystemExit for a closed pipe.
            with contextlib.suppress(OSError, ValueError, SystemExit):
                self._stderr().print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """Return one row per activity. If there are many, those that have not ended come first."""
        rows = list(self._rows)
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(4):
            table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_column(justify="right")
        if len(rows) > _MAX_ROWS:
            rows.sort(key=lambda row: row.seconds is not None)
        for row in rows[:_MAX_ROWS]:
            style = "cyan" if row.seconds is None else "bold red" if row.has_failed else "green"
            phase = Text(row.current if row.seconds is None else row.result, style)
            table.add_row(row.name, row.place, phase, Text(row.detail, "dim"), f"{row.elapsed_s:.1f} s")
        if len(rows) > _MAX_ROWS:
            num_ended = sum(row.seconds is not None for row in rows)
            table.add_row(f"... {len(rows)} in total, {num_ended} ended", "", "", "", "")
        return table

    def _stderr(self) -> Console:
        if self._console is None:  # created late, because it reads variables such as TERM
            self._console = Console(stderr=True, force_jupyter=False)
        return self._console

    def _mode(self) -> Literal["live", "plain", "off"]:
        if self._is_session:
            chosen = settings.PROGRESS.get()
            if chosen == "off" or sys.stderr is None or _logging_shows_lines():
                return "off"
            if settings.is_under_pytest() and chosen == "auto":
                return "off"
            # A notebook's stream says that it is a terminal, but keeps every frame of a live table.
            if chosen == "plain" or type(sys.stderr).__module__.startswith("ipykernel"):
                return "plain"
        return "live" if self._stderr().is_interactive else "plain"

    def _start_live(self) -> Live:
        live = Live(
            get_renderable=self.table,
            console=self._stderr(),
            refresh_per_second=_REFRESH_PER_S,
            transient=True,
            # Rich would send prints to standard error, also those that the user redirects to a file.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        live.start()
        return live


def _logging_shows_lines() -> bool:
    """Return whether a log record of level INFO of this module reaches a console."""
    if not logger.isEnabledFor(logging.INFO):
        return False
    current: logging.Logger | None = logger
    while current is not None:
        for handler in current.handlers:
            is_console = isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
            if is_console and handler.level <= logging.INFO:
                return True
        current = current.parent if current.propagate else None
    return False


SESSION = Display()


@contextlib.contextmanager
def activity(name: str, *, phase_level: int = logging.INFO) -> Iterator[Activity]:
    """Show an activity of this session while the block runs.

    Args:
        name: what is done.
        phase_level: level of the log records of its phases.
    """
    row = SESSION.begin(name, phase_level=phase_level)
    try:
        yield row
    except BaseException as error:
        outcome = "failed" if isinstance(error, Exception) else "interrupted"
        row.end(f"{outcome} while {row.current}" if row.current else outcome, has_failed=True)
        raise
    else:
        row.end(row.result)
    finally:
        SESSION.remove(row)
