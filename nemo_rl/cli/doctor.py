"""`nemo-rl doctor` checks machines, and `nemo-rl plan` shows what a job would do."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_rl.cli.options import Json

if TYPE_CHECKING:
    from nemo_rl.cli.checks import Check
    from nemo_rl.cli.cluster_checks import NodeChecks

Cluster = Annotated[bool, typer.Option("--cluster", help="Query every node of the cluster at RAY_ADDRESS.")]
Address = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="Query every node of the cluster with this head.")
]


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module in `app`."""
    app.command()(doctor)
    app.command()(plan)


def doctor(cluster: Cluster = False, address: Address = None, json: Json = False) -> None:
    """Check this machine, or every node of a cluster, and suggest fixes.

    The exit code is 1 if a finding would stop a run.
    """
    from nemo_rl.cli import display
    from nemo_rl.cli.checks import FATAL, OK, run_checks

    cluster = cluster or address is not None
    checks: list[tuple[NodeChecks | None, Check]]
    if cluster:
        from nemo_rl.cli.cluster_checks import check_nodes, joined_cluster

        with _quiet_standard_output(), joined_cluster(address):
            checks = [(node, check) for node in check_nodes() for check in node.checks]
    else:
        checks = [(None, check) for check in run_checks()]
    if json:
        nodes = [{} if node is None else {"node": node.address, "node_id": node.node_id} for node, _ in checks]
        display.print_json([{**node, **dataclasses.asdict(check)} for node, (_, check) in zip(nodes, checks)])
    else:
        rows = [
            [*([node.label] if node is not None else []), check.name, check.state, check.found]
            for node, check in checks
        ]
        display.print_table([*(["node"] if cluster else []), "check", "state", "found"], rows)
        for node, check in checks:
            if check.state != OK:
                location = f" on {node.label}" if node is not None else ""
                display.print_line(f"\n{check.state}: {check.name}{location}\n  fix: {check.fix}")
    if any(check.state == FATAL for _, check in checks):
        raise typer.Exit(1)


def plan(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML configuration of a training job, or a recipe's name.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    cluster: Cluster = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """Show what a job would do without starting it: workers, venvs to build, placements, memory."""
    from rich.console import Console

    from nemo_rl.cli import display
    from nemo_rl.jobs.command_line import config_path
    from nemo_rl.jobs.job_config import load_job_config
    from nemo_rl.jobs.plan import make_plan
    from nemo_rl.jobs.plan_view import print_plan

    checked = load_job_config(config_path(config), overrides or [])
    with _quiet_standard_output(), contextlib.ExitStack() as stack:
        if cluster or address is not None:
            from nemo_rl.cli.cluster_checks import joined_cluster

            stack.enter_context(joined_cluster(address))
        job_plan = make_plan(checked, on_cluster=cluster or address is not None)
    if json:
        display.print_json(dataclasses.asdict(job_plan))
    else:
        print_plan(job_plan, Console(width=None if sys.stdout.isatty() else 160))


@contextlib.contextmanager
def _quiet_standard_output() -> Iterator[None]:
    """Redirect output of libraries to standard error, so that standard output has only the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
