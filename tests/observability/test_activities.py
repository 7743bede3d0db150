"""The display of what a session waits for: on a terminal, in a pipe, switched off, and beside logging."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from nemo_rl.observability.activities import Display, activity

SESSION = """
import logging, os, sys
from nemo_rl.observability.activities import activity
{before}
with activity("group policy", phase_level=logging.DEBUG) as starting:
    starting.phase("starting 2 workers")
    print("a result")
    starting.result = "2 workers ready"
"""


def _run(before: str = "", **variables: str) -> tuple[str, str]:
    """Run a session without a terminal and outside pytest. Returns its output and its standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_VERSION"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION.format(before=before)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


def _terminal(width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, color_system=None)


def _rendered(display: Display) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(display.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_session_without_a_terminal_shows_one_line_per_phase() -> None:
    output, errors = _run()
    lines = errors.splitlines()
    assert lines[0] == "group policy: starting 2 workers"
    assert lines[1].startswith("group policy: 2 workers ready in ")
    assert (len(lines), output) == (2, "a result\n")


@pytest.mark.parametrize("variables", [{"NEMO_RL_PROGRESS": "off"}, {"PYTEST_VERSION": "9"}])
def test_session_is_silent_if_switched_off_or_under_pytest(variables: dict[str, str]) -> None:
    assert _run(**variables) == ("a result\n", "")


def test_plain_also_holds_under_pytest() -> None:
    assert "2 workers ready" in _run(NEMO_RL_PROGRESS="plain", PYTEST_VERSION="9")[1]


def test_nothing_is_shown_twice_where_logging_shows_it() -> None:
    _, errors = _run("logging.basicConfig(level=logging.INFO, format='%(message)s')")
    assert errors.count("2 workers ready") == 1
    assert "starting 2 workers" not in errors  # its level is DEBUG


def test_log_file_does_not_replace_the_display(tmp_path: Path) -> None:
    log = tmp_path / "log"
    _, errors = _run(f"logging.basicConfig(level=logging.INFO, filename={str(log)!r})")
    assert errors.count("2 workers ready") == log.read_text().count("2 workers ready") == 1


def test_stream_of_a_notebook_shows_lines() -> None:
    """It answers that it is a terminal."""
    stream = (
        "class Stream:\n    __module__ = 'ipykernel.iostream'\n    isatty = lambda self: True\n"
        "    flush = lambda self: None\n    write = lambda self, text: os.write(2, text.encode())\n"
        "sys.stderr = Stream()"
    )
    _, errors = _run(stream, TERM="xterm")
    assert errors.splitlines()[0] == "group policy: starting 2 workers"
    assert len(errors.splitlines()) == 2


def test_closed_standard_error_does_not_end_the_session() -> None:
    output, _ = _run("os.close(2)")
    assert output == "a result\n"


def test_terminal_shows_a_live_table_and_keeps_the_last_line(tmp_path: Path) -> None:
    """Standard output goes to a file, as in `python script.py > results`, and stays there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_VERSION"}
    terminal, child = pty.openpty()
    script = SESSION.format(before="") + "import time; time.sleep(0.1)"
    with open(tmp_path / "out", "w+") as out, open(terminal, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**environment, "TERM": "xterm", "COLUMNS": "120"},
            stdout=out,
            stderr=child,
        )
        os.close(child)
        shown = b""
        while True:
            try:
                shown += screen.read(65536)
            except OSError:  # the process has closed its end
                break
        assert process.wait() == 0
    text = shown.decode()
    assert "starting 2 workers" in text  # in the table
    assert "group policy: starting 2 workers" not in text
    assert text.count("group policy: 2 workers ready in ") == 1
    assert (tmp_path / "out").read_text() == "a result\n"


def test_failure_and_interruption_name_the_phase(caplog: pytest.LogCaptureFixture) -> None:
    def start(error: BaseException) -> None:
        with activity("group policy") as starting:
            starting.phase("reserving 4 bundles")
            raise error

    with caplog.at_level(logging.INFO):
        for error in (ValueError("no"), KeyboardInterrupt()):
            with pytest.raises(type(error)):
                start(error)
    ends = [record.getMessage().rpartition(" in ")[0] for record in caplog.records[1::2]]
    assert ends == [
        "group policy: failed while reserving 4 bundles",
        "group policy: interrupted while reserving 4 bundles",
    ]


def test_activities_of_several_threads_share_one_table() -> None:
    display = Display(_terminal())
    both = threading.Barrier(2)

    def work(name: str) -> None:
        row = display.begin(name)
        row.phase("working")
        both.wait()
        if name == "first":
            assert json.dumps(_rendered(display)).count("working") == 2
        both.wait()
        row.end("done")
        display.remove(row)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not display.is_live


def test_many_rows_show_unfinished_ones_first() -> None:
    display = Display(_terminal())
    rows = [display.begin(f"venv {number}") for number in range(61)]
    for row in rows[:60]:
        row.end("ready")
    text = _rendered(display)
    display.remove(*rows)
    assert "venv 60" in text
    assert "61 in total, 60 ended" in text
    assert len(text.splitlines()) < 30
