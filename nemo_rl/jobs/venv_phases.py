"""Shows the builds of venvs on all nodes as phases of a job's start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_rl.distributed.node_venvs import NodeProgress
    from nemo_rl.observability.console import ConsoleView
    from nemo_rl.observability.timer import Timeline

# What a warm start does in passing is not worth a line.
_SHORTEST_SHOWN_S = 0.1


class VenvPhases:
    """A callback for `ensure_venvs_on_each_node`; call `close` when it has returned."""

    def __init__(self, view: ConsoleView, timeline: Timeline) -> None:
        self._view, self._timeline = view, timeline
        self._open: set[tuple[str, str]] = set()

    def __call__(self, progress: NodeProgress) -> None:
        event = progress.event
        key = (f"venv of {event.venv.rpartition('.')[2]}: {event.phase}", f"venvs on {progress.node}")
        if event.state == "started" and event.phase != "resolve":
            self._open.add(key)
            self._view.phase_started(*key)
        elif event.state in ("done", "failed") and (key in self._open or event.seconds >= _SHORTEST_SHOWN_S):
            self._open.discard(key)
            self._view.phase_ended(*key, event.seconds)
            now = time.time()
            self._timeline.record(key[0], now - event.seconds, now, key[1], progress.node)

    def close(self) -> None:
        """Forget phases whose end was never told, such as those of a node that died."""
        for key in self._open:
            self._view.phase_ended(*key, 0.0)
        self._open.clear()
