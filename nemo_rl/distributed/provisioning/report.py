"""What making venvs ready on the nodes of a cluster told and led to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nemo_rl.errors import NodeVenvError, VenvError
from nemo_rl.venvs import Progress

logger = logging.getLogger(__name__)

_MAX_ROWS = 24
_STYLES = {"failed": "bold red", "done": "green"}


@dataclass(frozen=True)
class NodeProgress:
    """One event of one venv on one node. `node` is the node's IP address and host name, for people."""

    node_id: str
    node: str
    event: Progress


NodeProgressCallback = Callable[[NodeProgress], None]


@dataclass(frozen=True)
class NodeVenv:
    """One venv on one node: ready, or why not.

    Attributes:
        venv: its name.
        node_id, node: Ray's id, and address and host name for people.
        digest: of its content; empty when it could not even be planned.
        python: `<venv dir>/<venv>/bin/python`, or the interpreter that was asked for.
        stable_python: the same through the digest's path, which a later change of the lock leaves alone.
        built: built by this call on this node; else found ready, or received.
        received_from: the node that this call got it from, node to node; empty otherwise.
        seconds: per phase, in this call.
        error: None if it is ready.
    """

    venv: str
    node_id: str
    node: str
    digest: str = ""
    python: str = ""
    stable_python: str = ""
    built: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    received_from: str = ""


@dataclass(frozen=True)
class NodeVenvReport:
    """Every venv on every node.

    Attributes:
        entries: by node, in the order of `alive_nodes()`, and venv, in the order that was asked for.
        seconds: that the whole call took.
    """

    entries: tuple[NodeVenv, ...]
    seconds: float

    def of(self, venv: str) -> list[NodeVenv]:
        """One venv's entries, one per node."""
        return [entry for entry in self.entries if entry.venv == venv]

    def digest(self, venv: str) -> str:
        """The venv's digest on the driver's platform (the first node's)."""
        return self.of(venv)[0].digest

    def agrees(self, venv: str) -> bool:
        """Whether one path runs this venv, with the same content, on every node."""
        return len({(entry.stable_python, entry.digest) for entry in self.of(venv)}) == 1

    def python(self, venv: str, node_id: str | None = None) -> str:
        """The interpreter that workers of this venv should run: on `node_id`, or the one for all nodes.

        It is the digest's path, which outlives a change of the lock, where that is the same everywhere; else the path
        through the venv's name, which may mean other packages on a node of another platform.

        Raises:
            NodeVenvError: no one path is right for all nodes.
        """
        entries = [entry for entry in self.of(venv) if node_id in (None, entry.node_id)]
        for paths in ({entry.stable_python for entry in entries}, {entry.python for entry in entries}):
            if len(paths) == 1:
                return paths.pop()
        places = "; ".join(f"{entry.node}: {entry.python}" for entry in entries)
        raise NodeVenvError(
            f"the venv {venv} has another path on each node ({places}). Set NEMO_RL_VENV_DIR to one path for all nodes."
        )

    def to_plain(self) -> list[dict[str, object]]:
        """For a run directory: one JSON object per node and venv."""
        return [
            {
                "venv": entry.venv,
                "node": entry.node,
                "node_id": entry.node_id,
                "digest": entry.digest,
                "python": entry.python,
                "stable_python": entry.stable_python,
                "built": entry.built,
                "received_from": entry.received_from,
                "seconds": entry.seconds,
            }
            for entry in self.entries
        ]


class SharedFailureError(VenvError):
    """A venv that another node failed to build, which was to build it for this one too."""


def raise_for_failures(entries: Iterable[NodeVenv]) -> None:
    """Raise `NodeVenvError` if any venv is not ready: which, where and why, and what became of the others.

    It is raised from the first error that is not another's consequence.
    """
    entries = list(entries)
    # Causes before their consequences.
    failed = sorted(
        (entry for entry in entries if entry.error is not None),
        key=lambda entry: isinstance(entry.error, SharedFailureError),
    )
    if not failed:
        return
    lines = [
        f"{len({entry.venv for entry in failed})} of {len({entry.venv for entry in entries})} venvs are not ready."
    ]
    lines += _told(failed)
    fine = [entry for entry in entries if entry.error is None]
    if fine:
        lines += ["What the others did:", *_told(fine)]
    raise NodeVenvError("\n".join(lines)) from failed[0].error


def _told(entries: Iterable[NodeVenv]) -> list[str]:
    """One line for each venv and outcome, however many nodes it is about."""
    nodes: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        done = "built" if entry.built else "received" if entry.received_from else "ready"
        outcome = str(entry.error) if entry.error is not None else done
        where = (
            f"{entry.node} in {sum(entry.seconds.values()):.1f} s" if outcome in ("built", "received") else entry.node
        )
        nodes.setdefault((entry.venv, outcome), []).append(where)
    return [f"- {venv} on {', '.join(names)}: {outcome}" for (venv, outcome), names in nodes.items()]


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
