"""The commands of `nemo-rl` and their exit codes.

Exit codes: 0 success; 1 a finding (damage, a difference, a missing venv) or a failed operation; 2 invalid input;
130 interrupted. Results go to standard output, everything else to standard error. Commands import heavy modules lazily,
so that `nemo-rl --help` starts fast.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated

import typer

from nemo_rl import __version__, settings
from nemo_rl.cli import doctor, env, jobs, project, rollouts, session, submit, venvs
from nemo_rl.errors import NemoRLError, exit_code

app = typer.Typer(
    name="nemo-rl",
    help="Run distributed workers on Ray, each class in its own uv venv.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(venvs.app, name="venvs")
app.add_typer(rollouts.app, name="rollouts")
app.add_typer(env.app, name="env")
app.add_typer(session.app, name="session")
project.add_commands(app)
jobs.add_commands(app)
doctor.add_commands(app)
submit.add_commands(app)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def run() -> None:
    """Run the command line of this process and exit with its code."""
    for name, closed in (("stdout", sys.stdout is None), ("stderr", sys.stderr is None)):
        if closed:  # by `>&-` in a shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # logs and paths may contain characters outside the locale
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up like Ctrl-C
    code: int | str | None = 0
    try:
        app()
    except SystemExit as ended:
        code = ended.code
    except (NemoRLError, OSError) as error:
        if settings.TRACEBACK.get():
            raise
        typer.echo(f"nemo-rl: {error}", err=True)
        code = exit_code(error) if isinstance(error, NemoRLError) else 1
    try:
        sys.stdout.flush()
    except OSError as error:  # the disk is full, or the reader (such as `head`) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
        if not isinstance(error, BrokenPipeError):
            typer.echo(f"nemo-rl: standard output cannot be written: {error.strerror}", err=True)
        code = code or 1
    sys.exit(code)
