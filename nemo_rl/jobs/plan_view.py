"""Prints a job plan as tables."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from nemo_rl.jobs.plan import JobPlan
from nemo_rl.jobs.venv_forecast import BUILT, READY, VenvForecast

_GIB = 2**30


def print_plan(plan: JobPlan, console: Console) -> None:
    """Print a plan as tables."""
    workers = _table("workers", "role", "workers", "share of its bundle", "worker class")
    for role in plan.roles:
        workers.add_row(role.name, str(role.num_workers), f"{role.share:g}" if role.share else "none", role.fqn)
    pythons = _table("venvs", "roles", "state", "packages", "digest", "py_executable")
    for venv in plan.venvs:
        packages = "" if venv.num_packages is None else str(venv.num_packages)
        pythons.add_row(", ".join(venv.roles), venv.state, packages, (venv.digest or "")[:16], venv.py_executable)
    places = _table("placements", "bundle", "workers", *(["node"] if any(p.address for p in plan.placements) else []))
    for place in plan.placements:
        places.add_row(place.bundle, place.workers, *([place.address] if len(places.columns) == 3 else []))
    parts = [workers, pythons, *_build_tables(plan), places, *_memory_lines(plan)]
    if plan.obstacle:
        parts.append(Text(f"cannot start now: {plan.obstacle}", style="bold red"))
    console.print(Group(*parts, Text(f"{plan.samples_per_step} samples per step")))


def _build_tables(plan: JobPlan) -> list[Table | Text]:
    """Return a table of the venvs to build or receive. Nodes with equal rows share a row."""
    rows: Counter[tuple[str, ...]] = Counter()
    first_node: dict[tuple[str, ...], str] = {}
    for node in plan.nodes:
        lines = [(node.problem, "", "", "", "", "")] if node.problem else map(_build_row, node.venvs)
        for line in lines:
            rows[line] += 1
            first_node.setdefault(line, node.address)
    todo = {line: count for line, count in rows.items() if line[0] != READY}
    if not todo:
        return []
    table = _table("venvs to build or receive", "nodes", "state", "download", "installed", "seconds", "digest", "basis")
    for line, count in todo.items():
        table.add_row(first_node[line] if count == 1 else f"{first_node[line]} and {count - 1} more", *line)
    return [table]


def _build_row(venv: VenvForecast) -> tuple[str, ...]:
    if venv.state != BUILT:
        installed = _megabytes(venv.installed_bytes) if venv.installed_bytes else ""
        return (venv.state, "", installed, "", venv.digest[:16], venv.basis)
    bound = "at least " if venv.num_unknown else ""
    basis = venv.basis + (f"; without {venv.num_unknown} packages of unknown size" if venv.num_unknown else "")
    sizes = (f"{bound}{_megabytes(venv.download_bytes)}", f"{bound}{_megabytes(venv.installed_bytes)}")
    return (venv.state, *sizes, f"{bound}{venv.seconds:g}", venv.digest[:16], basis)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _memory_lines(plan: JobPlan) -> list[Text]:
    memory = plan.memory
    if memory is None:
        return [
            Text("memory: unknown, because config.json of the model is not on this machine and its name has no size")
        ]
    cache = "unknown" if memory.kv_cache is None else f"{memory.kv_cache / _GIB:.2f} GiB"
    training, weights = memory.training / _GIB, memory.generation_weights / _GIB
    generation = f", generation {weights:.2f}, KV cache {cache}" if memory.generation_weights else ""
    teacher = f", teacher {memory.teacher_weights / _GIB:.2f}" if memory.teacher_weights else ""
    return [
        Text(f"memory per worker, without activations: {memory.total / _GIB:.2f} GiB"),
        Text(f"  training {training:.2f} (weights, gradients, AdamW){generation}{teacher}"),
        Text(f"  {memory.num_parameters / 1e6:,.1f} M parameters ({memory.source})"),
    ]
