"""Reports venv builds on all nodes as startup phases of a job."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_rl.distributed.node_venvs import NodeProgress
    from nemo_rl.observability.console import ConsoleView
    from nemo_rl.observability.timer import Timeline

# Shorter phases, as in a warm start, are not shown.
_MIN_PHASE_S = 0.1


class VenvPhases:
    """Shows the progress of `ensure_venvs_on_each_node` in the console and the timeline. A context manager.

    Args:
        roles: The names of the roles that run in each venv, by the name of the venv.
    """

    def __init__(self, view: ConsoleView, timeline: Timeline, roles: Mapping[str, str]) -> None:
        self._view, self._timeline, self._roles = view, timeline, roles
        self._open: set[tuple[str, str]] = set()

    def __call__(self, progress: NodeProgress) -> None:
        event = progress.event
        key = (f"venv of {self._roles[event.venv]}: {event.phase}", f"venvs on {progress.node}")
        if event.state == "started" and event.phase != "resolve":
            self._open.add(key)
            self._view.phase_started(*key)
        elif event.state in ("done", "failed") and (key in self._open or event.seconds >= _MIN_PHASE_S):
            self._open.discard(key)
            self._view.phase_ended(*key, event.seconds)
            now = time.time()
            self._timeline.record(key[0], now - event.seconds, now, key[1], progress.node)

    def __enter__(self) -> VenvPhases:
        return self

    def __exit__(self, *_: object) -> None:
        # Phases of a node that died are still open.
        for key in self._open:
            self._view.phase_ended(*key, 0.0)
        self._open.clear()
