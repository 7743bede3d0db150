"""The view of provisioning progress, on a terminal and in lines."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from nemo_rl.distributed.provisioning.progress_view import VenvProgressView
from nemo_rl.distributed.provisioning.report import NodeProgress
from nemo_rl.observability.activities import Display
from nemo_rl.venvs import Progress


def _event(
    phase: str,
    state: str,
    *,
    venv: str = "pkg.Worker",
    node: str = "10.0.0.1",
    detail: str = "",
    digest: str = "d" * 64,
) -> NodeProgress:
    return NodeProgress(node, node, Progress(venv, digest, phase, state, 1.5 if state == "done" else 0.0, detail))


def _display(*, terminal: bool = True) -> Display:
    return Display(
        Console(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=160, color_system=None)
    )


def _rendered(display: Display) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(display.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_shows_the_latest_phase() -> None:
    display = _display()
    with VenvProgressView(display) as view:
        for node in ("10.0.0.1", "10.0.0.2"):
            view(_event("fetch", "started", node=node))
        view(_event("fetch", "running", detail="Downloading torch"))
        view(_event("seal", "done", node="10.0.0.2"))
        first, second = [line.split() for line in _rendered(display).splitlines()]
    assert first[:7] == ["venv", "of", "pkg.Worker", "10.0.0.1", "fetch", "Downloading", "torch"]
    assert second[:5] == ["venv", "of", "pkg.Worker", "10.0.0.2", "ready"]
    assert not display.is_live


def test_failure_stays_visible() -> None:
    display = _display()
    with VenvProgressView(display) as view:
        view(_event("resolve", "failed", detail="no such extra"))
        assert "no such extra" in _rendered(display)


def test_ready_venvs_are_not_shown() -> None:
    display = _display()
    view = VenvProgressView(display)
    view(_event("resolve", "started", digest=""))
    view(_event("resolve", "done"))
    assert not display.is_live
    assert not _rendered(display).strip()


def test_each_phase_has_one_line(caplog: pytest.LogCaptureFixture) -> None:
    display = _display(terminal=False)
    with caplog.at_level(logging.INFO), VenvProgressView(display) as view:
        view(_event("resolve", "done"))
        for phase, digest in (("fetch", "base"), ("seal", "base"), ("fetch", "d" * 64), ("seal", "d" * 64)):
            view(_event(phase, "started", digest=digest))
            view(_event(phase, "running", detail="noise", digest=digest))
            view(_event(phase, "done", digest=digest))
    lines = [record.getMessage() for record in caplog.records]
    title = "venv of pkg.Worker on 10.0.0.1"
    assert lines[:4] == [f"{title}: fetch", f"{title}: seal", f"{title}: fetch", f"{title}: seal"]
    assert lines[4].startswith(f"{title}: ready in ")
    assert display._stderr().file.getvalue().splitlines() == lines  # type: ignore[attr-defined]
    assert len(lines) == 5


def test_venv_of_another_process_is_ready_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), VenvProgressView(_display(terminal=False)) as view:
        view(_event("wait", "started", detail="for process 7"))
        view(_event("wait", "done"))
    assert caplog.messages[0] == "venv of pkg.Worker on 10.0.0.1: wait for process 7"
    assert caplog.messages[1].startswith("venv of pkg.Worker on 10.0.0.1: ready in ")
