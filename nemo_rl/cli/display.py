"""Output of the command line: rich on a terminal, aligned plain text in a pipe, JSON on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_rl.cli.parallel_build import Outcome
from nemo_rl.venvs import PHASES, Progress

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_REFRESH_S = 0.1


def print_json(value: Any) -> None:
    """Write JSON to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def print_line(text: str = "") -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Write a table to standard output: styled on a terminal, else aligned text without truncation."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        table = _rich_table(columns, title)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    if title:
        print_line(title)
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def size(num_bytes: float) -> str:
    """Format a number of bytes.

    Example:
        >>> size(1_500_000)
        '2 MB'
    """
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def ago(moment: float) -> str:
    """Format the time since `moment` (seconds since the epoch)."""
    seconds = max(0.0, time.time() - moment)
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} d ago"


@dataclass
class _Row:
    """Holds the state of one running build."""

    phase: str = "start"
    since: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    detail: str = ""
    state: str = "running"


class BuildView:
    """Shows the progress of builds on standard error: a live table on a terminal, else one line per finished phase.

    A context manager. Pass its `update` to `build_all`.
    """

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._live: Live | None = None
        self._refreshed = 0.0

    def __enter__(self) -> BuildView:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # No refresh thread: builders are forked from this process, which must be single-threaded.
            self._live = Live(console=Console(stderr=True), auto_refresh=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None and self._live.is_started:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def update(self, name: str, event: Progress | Outcome | None) -> None:
        """Process one event of the builder `name`. None only refreshes the table."""
        if isinstance(event, Progress):
            self._progress(name, event)
        elif isinstance(event, Outcome):
            self._outcome(name, event)
        if self._live is not None and self._rows:
            self._live.start()  # without rows there is nothing to show
        # uv may print hundreds of lines a second.
        if self._live is not None and time.monotonic() - self._refreshed > _REFRESH_S:
            self._refreshed = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _progress(self, name: str, event: Progress) -> None:
        row = self._rows.setdefault(name, _Row())
        if row.state != "running":
            return  # another name of a finished venv
        if event.state == "started":
            row.phase, row.since, row.detail = event.phase, time.monotonic(), event.detail
            if self._live is None and event.phase == "wait":
                note(f"{name}: waiting for {event.detail}")
        elif event.state == "running":
            row.detail = event.detail
        else:
            row.seconds[event.phase] = row.seconds.get(event.phase, 0.0) + event.seconds
            if self._live is None and event.state == "done":
                note(f"{name}: {event.phase} {event.seconds:.2f} s")

    def _outcome(self, name: str, event: Outcome) -> None:
        row = self._rows.setdefault(name, _Row())
        if event.error is not None:
            row.state, row.detail = "failed", str(event.error).partition("\n")[0]
        elif row.state == "running":
            row.state, row.detail = ("built" if event.venv and event.venv.built else "ready"), ""
        if self._live is None:
            note(f"{event.target.name}: {row.state} after {event.seconds:.2f} s")

    def _table(self) -> Table:
        from rich.text import Text

        table = _rich_table(["venv", "state", *PHASES, "detail"], "")
        for name, row in self._rows.items():
            cells = [name, row.state]
            for phase in PHASES:
                seconds = row.seconds.get(phase)
                if row.state == "running" and phase == row.phase:
                    seconds = (seconds or 0.0) + time.monotonic() - row.since
                cells.append("" if seconds is None else f"{seconds:.1f}")
            table.add_row(*(Text(cell) for cell in (*cells, row.detail)))
        return table


def _rich_table(columns: Sequence[str], title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_phase = column in PHASES
        table.add_column(column, overflow="fold", justify="right" if is_phase else "left", no_wrap=is_phase)
    return table
