"""`nemo-rl venvs why`: gathers the explanations and shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl.cli import display
from nemo_rl.cli.targets import Target
from nemo_rl.errors import NemoRLError
from nemo_rl.utils.names import abbreviated, nearest_names
from nemo_rl.venvs import plan
from nemo_rl.venvs.explain import Explanation, difference, explain
from nemo_rl.venvs.explain import to_json as explanation_to_json

_MAX_DEMANDS = 8


@dataclass(frozen=True)
class Comparison:
    """Other workers that share one py_executable, against the one that was asked about.

    Attributes:
        workers: their FQNs.
        explanation: None when their venv cannot be resolved here; then `difference` says why.
        difference: why their version is another; None when it is the same.
    """

    workers: tuple[str, ...]
    explanation: Explanation | None
    difference: str | None


@dataclass(frozen=True)
class Answer:
    """Everything `why` has to say. `near` holds similar names when the package is not there."""

    mine: Explanation
    others: tuple[Comparison, ...]
    near: tuple[str, ...]


def answer(mine: Target, others: Sequence[Target], package: str) -> Answer:
    """Explain a package of one target, and why the others differ. Raises what `plan` and `explain` raise for `mine`."""
    venv_plan = plan(mine.py_executable)
    explanation = explain(mine.name, venv_plan, package)
    near: list[str] = []
    if explanation.version is None:
        names = {line.partition("==")[0].partition(" @ ")[0] for line in venv_plan.requirements}
        near = nearest_names(explanation.package, sorted(names), 3)
    groups: dict[str, list[str]] = {}
    for other in others:
        groups.setdefault(other.py_executable, []).append(other.name)
    comparisons = [
        _comparison(explanation, py_executable, tuple(names), package)
        for py_executable, names in groups.items()
        if py_executable != mine.py_executable or len(others) == 1
    ]
    return Answer(explanation, tuple(comparisons), tuple(near))


def _comparison(mine: Explanation, py_executable: str, names: tuple[str, ...], package: str) -> Comparison:
    try:
        other = explain(names[0], plan(py_executable), package)
    except NemoRLError as error:
        return Comparison(names, None, f"its venv cannot be resolved here: {str(error).partition(chr(10))[0]}")
    return Comparison(names, other, difference(mine, other))


def show(result: Answer) -> None:
    """Print the answer for people."""
    mine = result.mine
    if mine.version is None:
        hint = f" Did you mean {', '.join(result.near)}?" if result.near else ""
        display.print_line(f"{mine.worker} does not have {mine.package}.{hint}")
    else:
        display.print_line(f"{mine.worker} gets {mine.package} {mine.version}")
        for route in mine.routes:
            display.print_line(f"  through {route}")
        if mine.source == "interpreter":
            display.print_line(f"  installed in the interpreter {mine.spec}, which is used as it is")
        if mine.replaced:
            display.print_line(f"  in place of {mine.replaced} of the venv below")
        demands = [str(demand) for demand in mine.demands]
        if demands:
            display.print_line(f"  asked for by {abbreviated(demands, _MAX_DEMANDS)}")
    if not result.others:
        return
    display.print_line()
    rows = []
    for comparison in result.others:
        other = comparison.explanation
        version = "?" if other is None else other.version or "not there"
        for worker in comparison.workers:
            rows.append([worker, version, "same" if comparison.difference is None else "differs"])
    display.print_table(["other workers", mine.package, ""], rows)
    for comparison in result.others:
        if comparison.difference is not None:
            display.print_line(f"\n{', '.join(comparison.workers)}:\n  {comparison.difference}")


def to_json(result: Answer) -> dict[str, Any]:
    """The answer as plain data."""
    return {
        **explanation_to_json(result.mine),
        "near": list(result.near),
        "others": [
            {
                "workers": list(comparison.workers),
                "explanation": explanation_to_json(comparison.explanation) if comparison.explanation else None,
                "difference": comparison.difference,
            }
            for comparison in result.others
        ],
    }
