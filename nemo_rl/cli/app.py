"""The commands of `nemo-rl`, and how it ends.

Exit codes: 0 fine; 1 a finding (damage, a difference, a venv that is not there) or an operation that failed;
2 wrong input; 130 interrupted. Results go to standard output, everything else to standard error.
Nothing heavy is imported before a command needs it: `nemo-rl --help` must feel instant.
"""

from __future__ import annotations

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
    try:
        app()
    except NemoRLError as error:
        if settings.TRACEBACK.get():
            raise
        typer.echo(f"nemo-rl: {error}", err=True)
        sys.exit(exit_code(error))
