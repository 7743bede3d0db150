"""The driver's view of provisioning."""

from __future__ import annotations

from types import TracebackType

from nemo_rl.distributed.provisioning.report import NodeProgress
from nemo_rl.observability.activities import SESSION, Activity, Display


class VenvProgressView:
    """Shows `NodeProgress` events among the activities of the session. Omits venvs that are already ready.

    Example::

        with VenvProgressView() as view:
            ensure_venvs_on_each_node(venvs, progress=view)

    Args:
        display: where to show them. Default: the session's.
    """

    def __init__(self, display: Display | None = None) -> None:
        self._display = display or SESSION
        self._rows: dict[tuple[str, str], Activity] = {}  # by node and venv
        self._digests: dict[tuple[str, str], str] = {}

    def __enter__(self) -> VenvProgressView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for row in self._rows.values():
            if row.seconds is None:  # another process built it, or its node died
                row.end("ready" if error is None else "not ready", has_failed=error is not None)
        self._display.remove(*self._rows.values())
        self._rows = {}

    def __call__(self, progress: NodeProgress) -> None:
        """Show one event."""
        event = progress.event
        key = (progress.node_id, event.venv)
        if event.phase == "resolve" and event.state != "failed":
            self._digests[key] = event.digest
            return  # a ready venv has no further phase
        if key not in self._rows:
            self._rows[key] = self._display.begin(f"venv of {event.venv}", progress.node)
        row = self._rows[key]
        if event.state == "failed":
            row.end(f"{event.phase} failed: {event.detail}".removesuffix(": "), has_failed=True)
        elif event.state == "running":
            row.update(event.detail)
        elif event.state == "started":
            row.phase(event.phase, event.detail)
        elif event.phase == "seal" and self._digests.get(key) in (None, event.digest):  # else an overlay's base
            row.end("ready")
