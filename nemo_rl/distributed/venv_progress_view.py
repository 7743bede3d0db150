"""What making venvs ready looks like: one live line per node and venv on a terminal, one line per event elsewhere."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nemo_rl.distributed.provisioning.report import NodeProgress

logger = logging.getLogger(__name__)

_MAX_ROWS = 24
_STYLES = {"failed": "bold red", "done": "green"}


@dataclass
class _Row:
    """The latest of one venv on one node; `since` is when it was first heard of."""

    since: float
    phase: str = ""
    state: str = ""
    detail: str = ""
    took: float | None = None


class VenvProgressView:
    """Shows `NodeProgress` events; use it as the `progress=` of `ensure_venvs_on_each_node`.

    Nothing is shown for venvs that are ready at once::

        with VenvProgressView() as view:
            ensure_venvs_on_each_node(venvs, progress=view)
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._rows: dict[tuple[str, str], _Row] = {}
        self._live: Live | None = None

    def __enter__(self) -> VenvProgressView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self.table())
            self._live.stop()
            self._live = None

    def __call__(self, told: NodeProgress) -> None:
        """Take one event."""
        event = told.event
        key = (told.node, event.venv)
        if key not in self._rows and event.phase == "resolve" and event.state != "failed":
            return  # a ready venv goes no further
        row = self._rows.setdefault(key, _Row(time.monotonic()))
        row.phase, row.state, row.detail = event.phase, event.state, event.detail
        if event.state == "failed" or (event.phase == "seal" and event.state == "done"):
            row.took = time.monotonic() - row.since
        if self._console.is_terminal:
            self._refresh()
        elif event.state != "running":
            seconds = f" in {event.seconds:.1f} s" if event.seconds else ""
            detail = f": {event.detail}" if event.detail else ""
            logger.info("venv %s on %s: %s %s%s%s", event.venv, told.node, event.phase, event.state, seconds, detail)

    def table(self) -> Table:
        """The state of every venv on every node; the busy ones first where there are many."""
        table = Table(box=None, pad_edge=False)
        for title in ("venv", "node", "phase", ""):
            table.add_column(title, no_wrap=True, overflow="ellipsis")
        table.add_column("s", justify="right")
        rows = list(self._rows.items())
        if len(rows) > _MAX_ROWS:
            rows.sort(key=lambda item: item[1].took is not None)
        for (node, venv), row in rows[:_MAX_ROWS]:
            seconds = row.took if row.took is not None else time.monotonic() - row.since
            phase = "ready" if row.took is not None and row.state == "done" else row.phase
            style = _STYLES.get(row.state, "") if row.took is not None else "cyan"
            table.add_row(venv.rpartition(".")[2], node, Text(phase, style), Text(row.detail, "dim"), f"{seconds:.1f}")
        if len(rows) > _MAX_ROWS:
            ready = sum(row.took is not None for _, row in rows)
            table.add_row(f"... {len(rows)} in all, {ready} ready", "", "", "", "")
        return table

    def _refresh(self) -> None:
        if self._live is None:
            self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
