"""`nemo-rl session`: a Ray cluster and imported packages that stay between jobs, so that jobs start in seconds."""

from __future__ import annotations

import time
from typing import Annotated

import typer

app = typer.Typer(
    name="session",
    help="Keep Ray and imported packages between jobs, so that the next job starts in seconds.",
    no_args_is_help=True,
)


@app.command()
def start(
    idle_minutes: Annotated[
        float, typer.Option(min=0.1, help="End the session after this time without a job, in minutes.")
    ] = 60.0,
) -> None:
    """Start a warm session for jobs from this directory."""
    from nemo_rl.cli import display
    from nemo_rl.distributed.cluster.warm_session import find_session, start_session

    running = find_session()
    session = running or start_session(idle_minutes)
    state = "started" if running is None else f"started {display.ago(session.started)}"
    typer.echo(
        f"The warm session (process {session.process.pid}, {state}) has Ray at {session.address} and ends after "
        f"{session.idle_s / 60:g} minutes without a job. The first job of each kind shows it what to import; the next "
        "ones start faster."
    )


@app.command()
def status(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the warm session and its templates. Exits with 1 if there is none."""
    import psutil

    from nemo_rl.cli import display
    from nemo_rl.distributed.cluster.warm_session import find_session
    from nemo_rl.utils.processes import program_of

    session = find_session()
    if session is None:
        typer.echo("There is no warm session. `nemo-rl session start` starts one.", err=True)
        raise typer.Exit(1)
    templates = []
    for key, pid in session.templates.items():
        try:
            templates.append((key, pid, psutil.Process(pid).memory_info().rss, program_of(pid)))
        except (psutil.Error, OSError):
            continue  # it has just ended
    if json:
        display.print_json(
            {
                "process": session.process.pid,
                "address": session.address,
                "directory": str(session.directory),
                "age_s": round(time.time() - session.started, 1),
                "idle_limit_s": session.idle_s,
                "has_drivers": session.has_drivers,
                "templates": [
                    {"key": key, "process": pid, "python": python, "memory_bytes": memory}
                    for key, pid, memory, python in templates
                ],
            }
        )
        return
    display.print_line(
        f"process {session.process.pid}, Ray at {session.address}, started {display.ago(session.started)}, "
        f"{'used by a job' if session.has_drivers else 'no job'}; logs: {session.directory}"
    )
    display.print_table(
        ("template", "process", "memory", "python"),
        [(key, str(pid), display.size(memory), python) for key, pid, memory, python in templates],
    )


@app.command()
def stop(
    force: Annotated[bool, typer.Option("--force", help="Stop it even if a job uses it. The job ends.")] = False,
) -> None:
    """End the warm session, its cluster and its templates."""
    from nemo_rl.distributed.cluster.warm_session import find_session, stop_session

    session = find_session()
    if session is None:
        typer.echo("There is no warm session.", err=True)
        return
    if session.has_drivers and not force:
        typer.echo("nemo-rl: a job uses the warm session; wait for it, or stop both with --force", err=True)
        raise typer.Exit(1)
    stop_session(session)
    typer.echo("The warm session has ended.")
