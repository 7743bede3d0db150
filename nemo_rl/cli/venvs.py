"""`nemo-rl venvs` builds, inspects and maintains the venvs of workers."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_rl import settings
from nemo_rl.cli.options import Json
from nemo_rl.errors import ConfigError, NemoRLError, exit_code

if TYPE_CHECKING:
    from nemo_rl.cli.targets import Target

Match = Annotated[
    list[str] | None,
    typer.Option("--match", metavar="TEXT", help="Registered workers whose name or extras contain TEXT. Repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="TEXT", help="Not workers whose name or extras contain TEXT. Repeatable."),
]

app = typer.Typer(
    help="Build, inspect and maintain the venvs of workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_command(json: Json = False) -> None:
    """List the venvs on disk, and the state of the venv of each registered worker."""
    from nemo_rl.cli import display
    from nemo_rl.cli.targets import registered_targets
    from nemo_rl.venvs import list_venvs

    infos = list_venvs()
    targets = registered_targets()
    workers = [_worker_state(target.name, target.py_executable) for target in targets]
    editable = _editable_packages(targets)
    if json:
        display.print_json({"venvs": [_plain(info) for info in infos], "workers": workers, "editable": editable})
        return
    rows = []
    for info in infos:
        manifest = info.manifest
        rows.append(
            [
                info.digest,
                "in use" if info.in_use else "sealed" if info.sealed else "not sealed",
                str(len(manifest.packages)) if manifest else "",
                display.size(manifest.num_bytes) if manifest else "",
                manifest.python if manifest else "",
                (manifest.ray or "") if manifest else "",
                display.ago(info.last_used) if info.last_used else "",
                " ".join(info.names),
            ]
        )
    columns = ["digest", "state", "packages", "size", "python", "ray", "used", "names"]
    display.print_table(columns, rows, title="Venvs on disk" if rows else "No venvs on disk yet")
    display.print_line()
    rows = [[worker["worker"], worker["state"], worker["digest"], worker["py_executable"]] for worker in workers]
    display.print_table(["worker", "state", "digest", "py_executable"], rows, title="Registered workers")
    if editable:
        display.print_line()
        rows = [[package["package"], package["path"]] for package in editable]
        display.print_table(
            ["package", "path"], rows, title="Editable packages: workers import what is at these paths, also if mounted"
        )


def _editable_packages(targets: Sequence[Target]) -> list[dict[str, str]]:
    """Return the packages whose code is not in the workers' venvs but at a path, where other code may be mounted."""
    from nemo_rl.venvs import plan
    from nemo_rl.venvs.planning.relocation import located

    found: dict[str, str] = {}
    for py_executable in {target.py_executable for target in targets}:
        try:
            packages = plan(py_executable).packages
        except NemoRLError:
            continue  # its worker's state says why
        found |= {p.name: str(located(p.local.path)) for p in packages if p.local is not None and p.local.editable}
    return [{"package": name, "path": path} for name, path in sorted(found.items())]


def _worker_state(fqn: str, py_executable: str) -> dict[str, str]:
    from nemo_rl.cli.targets import venv_state

    state, digest = venv_state(py_executable)
    return {"worker": fqn, "state": state, "digest": digest, "py_executable": py_executable}


@app.command()
def build(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[FQN|EXTRA]...", help="Worker classes, extras, or `base`.")
    ] = None,
    all_workers: Annotated[bool, typer.Option("--all", help="Every registered worker.")] = False,
    match: Match = None,
    exclude: Exclude = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild existing venvs.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Maximum number of parallel builds.")] = 4,
    offline: Annotated[bool, typer.Option("--offline", help="Do not use the network.")] = False,
    from_bundle: Annotated[
        Path | None,
        typer.Option("--from-bundle", metavar="FILE", help="Build offline from an archive that `bundle` wrote."),
    ] = None,
    json: Json = False,
) -> None:
    """Build venvs in parallel and show the duration of each phase. Ctrl-C removes unfinished venvs."""
    from nemo_rl.cli import display
    from nemo_rl.cli.parallel_build import build_all

    selected = _select_targets(targets, all_workers, "build", match or (), exclude or ())
    try:
        with _package_source(from_bundle, offline, selected), display.BuildView() as view:
            outcomes = build_all(selected, force=force, jobs=jobs, on_event=view.update)
    except KeyboardInterrupt:
        display.note("nemo-rl: interrupted; unfinished venvs were removed")
        raise typer.Exit(130) from None
    records = [_outcome_record(outcome) for outcome in outcomes]
    if json:
        display.print_json(records)
    else:
        rows = [[r["name"], r["state"], r["digest"][:16], f"{r['seconds']:.2f}", r["python"]] for r in records]
        display.print_table(["venv", "state", "digest", "seconds", "python"], rows)
    failures = [outcome for outcome in outcomes if outcome.error is not None]
    for message in dict.fromkeys(str(outcome.error) for outcome in failures):
        display.note(f"nemo-rl: {message}")
    if failures:
        raise typer.Exit(min(exit_code(outcome.error) for outcome in failures if outcome.error))


def _select_targets(
    names: list[str] | None,
    all_workers: bool,
    verb: str,
    match: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[Target]:
    from nemo_rl.cli.targets import find_target, registered_targets

    if bool(names) == (all_workers or bool(match)):
        raise ConfigError(f"{verb} needs either worker classes and extras, or --all, but not both")
    targets = [find_target(name) for name in dict.fromkeys(names)] if names else registered_targets()
    selected = [
        target
        for target in targets
        if (not match or any(target.contains(text) for text in match))
        and not any(target.contains(text) for text in exclude)
    ]
    if not selected:
        raise ConfigError(
            f"no worker is selected: --match {' '.join(match) or 'is not given'}, --exclude "
            f"{' '.join(exclude) or 'is not given'}. Workers: {', '.join(target.name for target in targets)}"
        )
    return selected


def _package_source(bundle: Path | None, offline: bool, targets: list[Target]) -> AbstractContextManager[object]:
    """Set the source of packages during the block: the index, uv's cache, or a bundle."""
    from nemo_rl.cli.targets import is_interpreter
    from nemo_rl.venvs.transfer.bundle import opened_bundle

    if bundle is None:
        return settings.exported({"UV_OFFLINE": "1"} if offline else {})
    return opened_bundle(bundle, {t.name: t.py_executable for t in targets if not is_interpreter(t.py_executable)})


@app.command()
def bundle(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[FQN|EXTRA]...", help="Worker classes, extras, or `base`.")
    ] = None,
    all_workers: Annotated[bool, typer.Option("--all", help="Every registered worker.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE")] = Path("nemo-rl-bundle.tar.gz"),
    json: Json = False,
) -> None:
    """Write an archive for building venvs offline, and test it by building each venv from it."""
    from nemo_rl.cli import display
    from nemo_rl.cli.targets import is_interpreter
    from nemo_rl.venvs.transfer.bundle import write_bundle

    selected = {t.name: t.py_executable for t in _select_targets(targets, all_workers, "bundle")}
    selected = {name: text for name, text in selected.items() if not is_interpreter(text)}
    index = write_bundle(selected, output)
    packed = output.stat().st_size
    if json:
        display.print_json({"path": str(output), "packed_bytes": packed, **dataclasses.asdict(index)})
        return
    content = f"{len(index.venvs)} venvs for Python {index.python} on {index.platform}"
    display.print_line(f"{output}: {content}, {display.size(packed)} ({display.size(index.num_bytes)} unpacked)")
    command = ["nemo-rl", "venvs", "build", "--from-bundle", str(output), *selected]
    display.print_line(f"Build from it: {shlex.join(command)}")


def _outcome_record(outcome: Any) -> dict[str, Any]:
    venv, error = outcome.venv, outcome.error
    if venv is None:
        state = "failed"
    elif venv.manifest is None:
        state = "interpreter"
    else:
        state = "built" if venv.built else "ready"
    return {
        "name": outcome.target.name,
        "py_executable": outcome.target.py_executable,
        "state": state,
        "python": venv.python if venv else "",
        "digest": venv.digest if venv else "",
        "seconds": round(outcome.seconds, 3),
        "phases": venv.manifest.seconds if venv and venv.built else {},
        "error": str(error) if error else None,
    }


@app.command()
def wrappers(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them; put it on PATH.")],
) -> None:
    """Write a command `python-CLASS` for each registered worker, which runs the interpreter of its venv."""
    from nemo_rl.cli import display
    from nemo_rl.cli.targets import registered_targets
    from nemo_rl.venvs import InterpreterSpec, Store, parse_py_executable

    store = Store.default()
    directory.mkdir(parents=True, exist_ok=True)
    for target in registered_targets():
        spec = parse_py_executable(target.py_executable)
        python = spec.path if isinstance(spec, InterpreterSpec) else store.name_path(target.name) / "bin" / "python"
        wrapper = directory / f"python-{target.name.rpartition('.')[2]}"
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(str(python))} "$@"\n', encoding="utf-8")
        wrapper.chmod(0o755)
        display.print_line(str(wrapper))


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME|DIGEST]...", help="Venvs to verify. Default: all.")
    ] = None,
    json: Json = False,
) -> None:
    """Compare every installed file with its recorded hash. The exit code is 1 if a file is damaged."""
    from nemo_rl.cli import display
    from nemo_rl.venvs import list_venvs
    from nemo_rl.venvs import verify as verify_venv
    from nemo_rl.venvs.storage.verify import remedy

    infos = list_venvs()
    known = {name for info in infos for name in info.names} | {info.digest for info in infos}
    unknown = [name for name in names or () if name not in known and name[:16] not in known]
    if unknown:
        existing = ", ".join(sorted(name for info in infos for name in info.names)) or "none"
        raise ConfigError(f"there is no venv {', '.join(map(repr, unknown))} on disk. Existing venvs: {existing}")
    findings = [finding for name in names or sorted(info.digest for info in infos) for finding in verify_venv(name)]
    if json:
        display.print_json([dataclasses.asdict(finding) for finding in findings])
    elif findings:
        rows = [[finding.venv, finding.path, finding.problem, finding.package] for finding in findings]
        display.print_table(["venv", "file", "problem", "package"], rows)
        damaged = " ".join(dict.fromkeys(finding.venv for finding in findings))
        fix = remedy([finding.package for finding in findings], f"`nemo-rl venvs build --force {damaged}`")
        display.note(f"nemo-rl: {len(findings)} findings. {fix}")
    else:
        display.print_line("No damaged files.")
    if findings:
        raise typer.Exit(1)


@app.command()
def prune(
    everything: Annotated[bool, typer.Option("--all", help="Also remove venvs that have a name.")] = False,
    older_than: Annotated[
        float,
        typer.Option("--older-than", min=0, metavar="DAYS", help="Keep venvs that were used in the last DAYS days."),
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the venvs to remove without removing them.")] = False,
    json: Json = False,
) -> None:
    """Remove venvs that have no name and are not in use, and leftovers of dead builders."""
    from nemo_rl.cli import display
    from nemo_rl.venvs import prune as prune_venvs

    report = prune_venvs(keep_names=() if everything else None, older_than_s=older_than * 86400, dry_run=dry_run)
    record = {
        "removed": report.removed,
        "skipped": report.skipped,
        "freed_bytes": report.freed_bytes,
        "dry_run": report.dry_run,
    }
    if json:
        display.print_json(record)
        return
    verb = "Would remove" if dry_run else "Removed"
    display.print_line(f"{verb} {len(report.removed)} venvs, {display.size(report.freed_bytes)} of disk.")
    if report.skipped:
        display.print_line(f"Kept, because in use or being built: {', '.join(dict.fromkeys(report.skipped))}.")


@app.command()
def path(target: Annotated[str, typer.Argument(metavar="FQN|EXTRA")], json: Json = False) -> None:
    """Print the path of a worker's interpreter. The exit code is 1 if its venv is not built."""
    from nemo_rl.cli import display
    from nemo_rl.cli.targets import find_target
    from nemo_rl.venvs import InterpreterSpec, Store, find_sealed, plan

    worker = find_target(target)
    venv_plan = plan(worker.py_executable)
    if venv_plan.is_interpreter:
        assert isinstance(venv_plan.spec, InterpreterSpec)
        python, built = venv_plan.spec.path, True
    else:
        store, sealed = Store.default(), find_sealed(venv_plan.digest)
        is_named = store.names().get(worker.name) == venv_plan.digest[:16]
        python = str((store.name_path(worker.name) if is_named else store.link(venv_plan.digest)) / "bin" / "python")
        built = sealed is not None
    if json:
        display.print_json({"name": worker.name, "python": python, "built": built, "digest": venv_plan.digest})
    elif built:
        display.print_line(python)
    if not built:
        display.note(f"nemo-rl: the venv of {target} is not built. Run: nemo-rl venvs build {target}")
        raise typer.Exit(1)


@app.command()
def why(
    target: Annotated[str, typer.Argument(metavar="FQN|EXTRA")],
    package: Annotated[str, typer.Argument(metavar="PACKAGE")],
    other: Annotated[
        str | None, typer.Option("--and", metavar="FQN|EXTRA", help="Compare with this target. Default: all workers.")
    ] = None,
    json: Json = False,
) -> None:
    """Explain which version of a package a worker gets, and why other workers get a different one.

    The exit code is 1 if the worker does not have the package, or if the target of --and has a different version.
    """
    from nemo_rl.cli import display, why_view
    from nemo_rl.cli.targets import find_target, registered_targets

    worker = find_target(target)
    others = [find_target(other)] if other else [t for t in registered_targets() if t.name != worker.name]
    answer = why_view.answer(worker, others, package)
    if json:
        display.print_json(why_view.to_json(answer))
    else:
        why_view.show(answer)
    if answer.explanation.version is None or (other is not None and answer.others[0].difference is not None):
        raise typer.Exit(1)


def _plain(info: Any) -> dict[str, Any]:
    manifest = dataclasses.asdict(info.manifest) if info.manifest else None
    if manifest is not None:
        manifest["num_records"] = len(manifest.pop("records"))  # thousands of entries, used only by `verify`
    return {
        "digest": info.digest,
        "names": list(info.names),
        "path": str(info.path) if info.path else None,
        "sealed": info.sealed,
        "in_use": info.in_use,
        "last_used": info.last_used,
        "manifest": manifest,
    }
