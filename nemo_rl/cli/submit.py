"""`nemo-rl submit`, `status`, `logs`, `stop`: jobs on a running cluster, over Ray's job server."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_rl.errors import ConfigError
from nemo_rl.utils.names import abbreviated

if TYPE_CHECKING:
    from nemo_rl.jobs.submission import JobState, Upload

Address = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Ray's job server. Default: RAY_API_SERVER_ADDRESS, then loopback."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
JobId = Annotated[str, typer.Argument(metavar="JOB")]

_SHOWN_FILES = 5
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module under `app`."""
    app.command(context_settings={"allow_interspersed_args": False})(submit)
    app.command()(status)
    app.command()(logs)
    app.command()(stop)


def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What the head of the cluster runs.")],
    address: Address = None,
    working_dir: Annotated[
        str,
        typer.Option("--working-dir", metavar="DIR|URI", help="The job's directory: tracked and new .py files travel."),
    ] = ".",
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Leave out, as in .gitignore. Repeatable.")
    ] = None,
    untracked: Annotated[
        bool, typer.Option("--untracked", help="Also upload all other files that git does not ignore.")
    ] = False,
    py_module: Annotated[
        list[str] | None,
        typer.Option("--py-module", metavar="PATH|URI", help="Directory, .py, wheel, zip or URI. Repeatable."),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="K=V", help="A variable of the job. Repeatable.")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option("--secret", metavar="NAME[=FILE]", help="A variable from the head's own, or a file there."),
    ] = None,
    max_size: Annotated[str, typer.Option("--max-size", metavar="SIZE", help="Refuse to upload more.")] = "100MB",
    name: Annotated[str, typer.Option("--name", help="The job's id. Default: script and time.")] = "",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id and return.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded.")] = False,
    json: Json = False,
) -> None:
    """Run a command on a cluster: upload its files, follow the log, end with the job's exit code."""
    from nemo_rl.cli import display
    from nemo_rl.jobs.submission import JobServer, Secret, Submission, parse_env, prepared

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
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Default: all jobs.")] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Show one job, or all. For one, exit code 1 when it has failed or was stopped."""
    from nemo_rl.cli import display
    from nemo_rl.jobs.submission import JobServer

    server = JobServer(address)
    if job is None:
        found = server.jobs()
        if json:
            display.print_json([dataclasses.asdict(state) for state in found])
        else:
            rows = [[s.job_id, s.status, display.ago(s.started) if s.started else "", s.entrypoint] for s in found]
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
        bool, typer.Option("--follow", "-f", help="Go on until the job ends; end with its exit code.")
    ] = False,
) -> None:
    """Print what a job has written."""
    from nemo_rl.jobs.submission import JobServer

    server = JobServer(address)
    if follow:
        server.state(job)  # an unknown job is an error, not a log that never begins
        _follow(server, job, json=False)
    _write(server.logs(job))


def stop(job: JobId, address: Address = None) -> None:
    """Ask a job to end. Exit code 1 when it had ended already."""
    from nemo_rl.cli import display
    from nemo_rl.jobs.submission import JobServer

    server = JobServer(address)
    if server.stop(job):
        display.note(f"nemo-rl: {job} is being stopped")
        return
    display.note(f"nemo-rl: {_sentence(server.state(job))}")
    raise typer.Exit(1)


def _follow(server: Any, job_id: str, json: bool) -> None:
    """Follow a job to its end and exit with its code. With `json` its log goes to standard error."""
    from nemo_rl.cli import display

    try:
        state = server.follow(job_id, (lambda text: _write(text, sys.stderr)) if json else _write)
    except KeyboardInterrupt:
        display.note(f"\nnemo-rl: {job_id} goes on. Follow it: nemo-rl logs -f {job_id}; end it: nemo-rl stop {job_id}")
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
    # Ray's message repeats the end of the log, which the user has seen.
    message = state.message.strip().partition("\n")[0].partition(", last available logs")[0]
    why = "" if state.status == "SUCCEEDED" else f": {message}"
    return f"{state.job_id} {state.status}{code}{why}"


def _report(upload: Upload) -> None:
    """Say what will travel, the largest files first, and what stays behind."""
    from nemo_rl.cli import display

    for what, tree in upload.trees.items():
        display.note(f"{what}: {len(tree.files)} files, {display.size(tree.num_bytes)}, of {tree.root}")
        for file in tree.largest(_SHOWN_FILES):
            display.note(f"  {display.size(file.num_bytes):>8}  {file.path}")
        if tree.untracked:
            names = abbreviated(tree.untracked, _SHOWN_FILES)
            display.note(f"  not uploaded, because git does not track it: {names} (--untracked takes it along)")


def _upload_record(upload: Upload) -> dict[str, Any]:
    return {
        "num_bytes": upload.num_bytes,
        "commit": upload.metadata.get("commit"),
        "files": {what: [file.path for file in tree.files] for what, tree in upload.trees.items()},
        "untracked": {what: list(tree.untracked) for what, tree in upload.trees.items()},
    }


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    if match is None:
        raise ConfigError(f"--max-size {text!r}: expected a size such as 100MB or 2GB.")
    unit = match[2] if match[2].endswith("B") or not match[2] else match[2] + "B"
    return int(float(match[1]) * _UNITS[unit])
