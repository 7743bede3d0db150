"""Runs a job's command in a process that a warm session has prepared, if there is a session (see `warm_session`)."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rl import settings
from nemo_rl.distributed.cluster.local_clusters import read_record, record_path
from nemo_rl.distributed.cluster.template_client import TEMPLATE_VARIABLE, StartedProcess, Template, report_imports
from nemo_rl.errors import ClusterError
from nemo_rl.parsing import parse_module

if TYPE_CHECKING:
    from types import FrameType

_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


# The template of this process, `<directory>/<key>`; None without a warm session.
_template: str | None = None


def hand_over(module: str, argv: Sequence[str] | None, program: str | None) -> int | None:
    """Run `main(argv, program=program)` of a job's module in a process of the warm session; return its exit code.

    Returns None if this process has to run the job itself: there is no session, it would start a different process, it
    has no template yet, or this process is more than the command (a test, a debugger, a script of the user's own).
    """
    global _template
    _template = settings.take(TEMPLATE_VARIABLE)
    if _template is not None:  # this is the process that a template has started
        return None
    if settings.RAY_ADDRESS.get() is not None:
        return None
    with contextlib.suppress(ClusterError, OSError):
        cluster = read_record(record_path())
        if cluster is None or cluster.session is None or cluster.session.difference() is not None:
            return None
        if not _is_plain_command():
            return None
        template = Template.of(Path(cluster.session.templates), sys.executable, settings.snapshot())
        _template = str(template.directory / template.key)
        arguments = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
        request = {"module": module, "program": program, "arguments": arguments, "path": sys.path[0]}
        started = template.start(request, {TEMPLATE_VARIABLE: _template})
        if started is not None:
            return _wait(started)
        template.ask_for()
    return None


def report_imports_of_driver() -> None:
    """Tell the warm session, if there is one, what its template of this driver has to import."""
    if _template is not None:
        report_imports(_template)


def _wait(started: StartedProcess) -> int:
    """Wait for the process; it receives the signals that this one receives."""

    def forward(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(started.pid, number)

    for number in _FORWARDED_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    answer = b""
    while data := started.connection.recv(64):
        answer += data
    return int(answer) if answer else 128 + signal.SIGKILL


def _is_plain_command() -> bool:
    """Whether this process does nothing but run a job: `nemo-rl`, or a script that only calls a job's `main`."""
    if sys.gettrace() is not None or sys.getprofile() is not None:
        return False
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    # `python [OPTION] SCRIPT`: an option may change what the process does.
    if path is None or len(sys.orig_argv) < 2 or sys.orig_argv[1].startswith("-"):
        return False
    try:
        body = parse_module(Path(path).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    return all(_only_calls_job(statement) for statement in body)


def _only_calls_job(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return (statement.module or "").partition(".")[0] in ("nemo_rl", "__future__")
    if isinstance(statement, ast.Import):
        return all(name.name in ("sys", "re") for name in statement.names)
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
