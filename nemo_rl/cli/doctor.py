"""`nemo-rl doctor` and `nemo-rl plan`: what would stop a run, and what a run would do, before it is started."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemo_rl.cli.checks import Check
    from nemo_rl.cli.cluster_checks import NodeChecks

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Cluster = Annotated[bool, typer.Option("--cluster", help="Ask every node of the running cluster of RAY_ADDRESS.")]
Address = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="Ask every node of the cluster with this head.")
]


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module under `app`."""
    app.command()(doctor)
    app.command()(plan)


def doctor(cluster: Cluster = False, address: Address = None, json: Json = False) -> None:
    """Check this machine, or every node of a cluster. Exit code 1 only for what would stop a run."""
    from nemo_rl.cli import display
    from nemo_rl.cli.checks import FATAL, OK, run_checks

    cluster = cluster or address is not None
    found: list[tuple[NodeChecks | None, Check]]
    if cluster:
        from nemo_rl.cli.cluster_checks import check_nodes, joined_cluster

        with _quiet_standard_output(), joined_cluster(address):
            found = [(node, check) for node in check_nodes() for check in node.checks]
    else:
        found = [(None, check) for check in run_checks()]
    if json:
        of_node = [{} if node is None else {"node": node.address, "node_id": node.node_id} for node, _ in found]
        display.print_json([{**where, **dataclasses.asdict(check)} for where, (_, check) in zip(of_node, found)])
    else:
        rows = [
            [*([node.label] if node is not None else []), check.name, check.state, check.found] for node, check in found
        ]
        display.print_table([*(["node"] if cluster else []), "check", "state", "found"], rows)
        for node, check in found:
            if check.state != OK:
                where = f" on {node.label}" if node is not None else ""
                display.print_line(f"\n{check.state}: {check.name}{where}\n  fix: {check.fix}")
    if any(check.state == FATAL for _, check in found):
        raise typer.Exit(1)


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML of a GRPO job.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    cluster: Cluster = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """Say what a job would do: workers, venvs and what making them ready takes, placements, memory. Starts nothing."""
    from rich.console import Console

    from nemo_rl.algorithms.config import MasterConfig
    from nemo_rl.cli import display
    from nemo_rl.jobs.plan import make_plan
    from nemo_rl.jobs.plan_view import print_plan
    from nemo_rl.utils.config import load_config

    checked = load_config(MasterConfig, config, overrides or [])
    with _quiet_standard_output(), contextlib.ExitStack() as stack:
        if cluster or address is not None:
            from nemo_rl.cli.cluster_checks import joined_cluster

            stack.enter_context(joined_cluster(address))
        venv_plan = make_plan(checked, on_cluster=cluster or address is not None)
    if json:
        display.print_json(dataclasses.asdict(venv_plan))
    else:
        print_plan(venv_plan, Console(width=None if sys.stdout.isatty() else 160))


@contextlib.contextmanager
def _quiet_standard_output() -> Iterator[None]:
    """What libraries print goes to standard error: standard output is for the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
