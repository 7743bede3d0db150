"""The commands of `nemo-rl`, and how it ends.

Exit codes: 0 fine; 1 a finding (damage, a difference, a venv that is not there) or an operation that failed;
2 wrong input; 130 interrupted. Results go to standard output, everything else to standard error.
Nothing heavy is imported before a command needs it: `nemo-rl --help` must feel instant.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated

import typer

from nemo_rl import __version__, settings
from nemo_rl.cli import doctor, submit, venvs
from nemo_rl.errors import NemoRLError, exit_code

app = typer.Typer(
    name="nemo-rl",
    help="Workers on Ray, every class in its own uv-built venv.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(venvs.app, name="venvs")
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
        if closed:  # as after `>&-`: nobody listens
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a log or a path may hold what the locale does not
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
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
    except OSError as error:  # a full disk, or a reader that has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        if not isinstance(error, BrokenPipeError):
            typer.echo(f"nemo-rl: standard output cannot be written: {error.strerror}", err=True)
        code = code or 1
    sys.exit(code)
