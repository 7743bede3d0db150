"""The view of provisioning progress, on a terminal and in a log."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from nemo_rl.distributed.provisioning.report import NodeProgress, VenvProgressView
from nemo_rl.venvs import Progress


def _event(
    phase: str, state: str, *, venv: str = "pkg.Worker", node: str = "10.0.0.1", detail: str = ""
) -> NodeProgress:
    return NodeProgress(node, node, Progress(venv, "d" * 64, phase, state, 1.5 if state == "done" else 0.0, detail))


def _terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)


def _rendered(view: VenvProgressView) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(view.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_shows_the_latest_phase() -> None:
    with VenvProgressView(_terminal()) as view:
        for node in ("10.0.0.1", "10.0.0.2"):
            view(_event("fetch", "started", node=node))
        view(_event("fetch", "running", detail="Downloading torch"))
        view(_event("seal", "done", node="10.0.0.2"))
        first, second = [line.split() for line in _rendered(view).splitlines()[1:]]
    assert first[:5] == ["Worker", "10.0.0.1", "fetch", "Downloading", "torch"]
    assert second[:3] == ["Worker", "10.0.0.2", "ready"]


def test_failure_stays_visible() -> None:
    with VenvProgressView(_terminal()) as view:
        view(_event("resolve", "failed", detail="no such extra"))
        assert "no such extra" in _rendered(view)


def test_ready_venvs_are_not_rendered() -> None:
    view = VenvProgressView(_terminal())
    view(_event("resolve", "started"))
    view(_event("resolve", "done"))
    assert view._live is None
    assert len(_rendered(view).splitlines()) == 1


def test_many_rows_show_unfinished_venvs_first() -> None:
    view = VenvProgressView(Console(file=io.StringIO()))
    for number in range(60):
        view(_event("seal", "done", node=f"10.0.1.{number}"))
    view(_event("fetch", "started", node="10.0.2.1"))
    text = _rendered(view)
    assert "10.0.2.1" in text
    assert "61 in total, 60 finished" in text
    assert len(text.splitlines()) < 30


def test_phases_are_logged_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), VenvProgressView(Console(file=io.StringIO())) as view:
        view(_event("fetch", "started"))
        view(_event("fetch", "running", detail="noise"))
        view(_event("fetch", "done"))
    assert [record.getMessage() for record in caplog.records] == [
        "venv pkg.Worker on 10.0.0.1: fetch started",
        "venv pkg.Worker on 10.0.0.1: fetch done in 1.5 s",
    ]
