"""`nemo-rl submit`, `status`, `logs` and `stop` manage jobs on a cluster through Ray's job server."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_rl.cli.options import Json
from nemo_rl.errors import ConfigError
from nemo_rl.utils.names import abbreviated

if TYPE_CHECKING:
    from nemo_rl.jobs.job_server import JobState
    from nemo_rl.jobs.submission import Upload

Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="URL of Ray's job server. Default: RAY_API_SERVER_ADDRESS, then localhost."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB")]

_SHOWN_FILES = 5
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module in `app`."""
    app.command(context_settings={"allow_interspersed_args": False})(submit)
    app.command()(status)
    app.command()(logs)
    app.command()(stop)


def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="Command to run on the head of the cluster.")
    ],
    address: Address = None,
    working_dir: Annotated[
        str,
        typer.Option(
            "--working-dir",
            metavar="DIR|URI",
            help="Working directory of the job: uploads tracked files and new .py files.",
        ),
    ] = ".",
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Exclude files, as in .gitignore. Repeatable."),
    ] = None,
    untracked: Annotated[
        bool, typer.Option("--untracked", help="Also upload untracked files that git does not ignore.")
    ] = False,
    py_module: Annotated[
        list[str] | None,
        typer.Option(
            "--py-module", metavar="PATH|URI", help="Add a module: directory, .py file, wheel, zip or URI. Repeatable."
        ),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="K=V", help="Set a variable of the job. Repeatable.")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            "--secret",
            metavar="NAME[=FILE]",
            help="Pass a variable of the head to the job, or the content of a file on the head. Repeatable.",
        ),
    ] = None,
    max_size: Annotated[str, typer.Option("--max-size", metavar="SIZE", help="Maximum size of the upload.")] = "100MB",
    name: Annotated[str, typer.Option("--name", help="Id of the job. Default: script name and time.")] = "",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the id of the job and exit.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files to upload without submitting the job.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a command on a cluster: upload its files, follow its log, exit with its exit code."""
    from nemo_rl.cli import display
    from nemo_rl.jobs.job_server import JobServer
    from nemo_rl.jobs.submission import Secret, Submission, parse_env, prepared

    submission = Submission(
        command=command,
        working_dir=working_dir,
        py_modules=py_module or (),
        excludes=exclude or (),
        include_untracked=untracked,
        env=parse_env(env or ()),
        secrets=[Secret.parse(text) for text in secret or ()],
        name=name,
    )
    limit = _bytes(max_size)
    with prepared(submission) as upload:
        _report(upload)
        upload.check_size(limit)
        if dry_run:
            if json:
                display.print_json(_upload_record(upload))
            return
        server = JobServer(address)
        job_id = server.submit(submission, upload)
    display.note(f"submitted {job_id} to {server.address}")
    if no_wait:
        display.print_json({"job": job_id, **_upload_record(upload)}) if json else display.print_line(job_id)
        return
    _follow(server, job_id, json)


def status(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Id of the job. Default: all jobs.")] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Show one job or all jobs. For one job, the exit code is 1 if it failed or was stopped."""
    from nemo_rl.cli import display
    from nemo_rl.jobs.job_server import JobServer

    server = JobServer(address)
    if job is None:
        states = server.jobs()
        if json:
            display.print_json([dataclasses.asdict(state) for state in states])
        else:
            rows = [[s.job_id, s.status, display.ago(s.started) if s.started else "", s.entrypoint] for s in states]
            display.print_table(["job", "status", "started", "command"], rows, title="" if rows else "No jobs")
        return
    state = server.state(job)
    if json:
        display.print_json(dataclasses.asdict(state))
    else:
        display.print_line(_sentence(state))
    if state.is_final and state.code != 0:
        raise typer.Exit(1)


def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log until the job ends; exit with its exit code.")
    ] = False,
) -> None:
    """Print the log of a job."""
    from nemo_rl.jobs.job_server import JobServer

    server = JobServer(address)
    if follow:
        server.state(job)  # raises for an unknown job
        _follow(server, job, json=False)
    _write(server.logs(job))


def stop(job: JobId, address: Address = None) -> None:
    """Stop a job. The exit code is 1 if it has already ended."""
    from nemo_rl.cli import display
    from nemo_rl.jobs.job_server import JobServer

    server = JobServer(address)
    if server.stop(job):
        display.note(f"nemo-rl: stopping {job}")
        return
    display.note(f"nemo-rl: {_sentence(server.state(job))}")
    raise typer.Exit(1)


def _follow(server: Any, job_id: str, json: bool) -> None:
    """Follow a job until it ends and exit with its code. With `json`, its log goes to standard error."""
    from nemo_rl.cli import display

    try:
        state = server.follow(job_id, (lambda text: _write(text, sys.stderr)) if json else _write)
    except KeyboardInterrupt:
        display.note(
            f"\nnemo-rl: {job_id} is still running. Follow: nemo-rl logs -f {job_id}. Stop: nemo-rl stop {job_id}"
        )
        raise typer.Exit(130) from None
    if json:
        display.print_json(dataclasses.asdict(state))
    display.note(_sentence(state))
    raise typer.Exit(state.code)


def _write(text: str, stream: Any = None) -> None:
    stream = stream or sys.stdout
    stream.write(text)
    stream.flush()


def _sentence(state: JobState) -> str:
    code = "" if state.exit_code is None else f" with exit code {state.exit_code}"
    # Drop the end of the log from Ray's message; the user has already seen it.
    message = state.message.strip().partition("\n")[0].partition(", last available logs")[0]
    reason = "" if state.status == "SUCCEEDED" else f": {message}"
    return f"{state.job_id} {state.status}{code}{reason}"


def _report(upload: Upload) -> None:
    """Print the number of files to upload, the largest files, and untracked files that are not uploaded."""
    from nemo_rl.cli import display

    for name, tree in upload.trees.items():
        display.note(f"{name}: {len(tree.files)} files, {display.size(tree.num_bytes)}, from {tree.root}")
        for file in tree.largest(_SHOWN_FILES):
            display.note(f"  {display.size(file.num_bytes):>8}  {file.path}")
        if tree.untracked:
            names = abbreviated(tree.untracked, _SHOWN_FILES)
            display.note(f"  untracked, not uploaded: {names} (--untracked uploads them)")


def _upload_record(upload: Upload) -> dict[str, Any]:
    return {
        "num_bytes": upload.num_bytes,
        "commit": upload.metadata.get("commit"),
        "files": {name: [file.path for file in tree.files] for name, tree in upload.trees.items()},
        "untracked": {name: list(tree.untracked) for name, tree in upload.trees.items()},
    }


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    if match is None:
        raise ConfigError(f"--max-size {text!r}: expected a size such as 100MB or 2GB.")
    unit = match[2] if match[2].endswith("B") or not match[2] else match[2] + "B"
    return int(float(match[1]) * _UNITS[unit])
