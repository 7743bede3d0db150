"""Computes and prints the answer of `nemo-rl venvs why`."""

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
    """Compares other workers with the same py_executable to the worker in question.

    Attributes:
        workers: FQNs of the other workers.
        explanation: explanation for them; None if their venv cannot be resolved here.
        difference: why their version differs or cannot be resolved; None if the versions are equal.
    """

    workers: tuple[str, ...]
    explanation: Explanation | None
    difference: str | None


@dataclass(frozen=True)
class Answer:
    """Holds the explanation for a worker, its comparisons, and similar names if the package is missing."""

    explanation: Explanation
    others: tuple[Comparison, ...]
    near: tuple[str, ...]


def answer(target: Target, others: Sequence[Target], package: str) -> Answer:
    """Explain a package of a target, and why other targets differ. Raises the errors of `plan` and `explain`."""
    venv_plan = plan(target.py_executable)
    explanation = explain(target.name, venv_plan, package)
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
        if py_executable != target.py_executable or len(others) == 1
    ]
    return Answer(explanation, tuple(comparisons), tuple(near))


def _comparison(explanation: Explanation, py_executable: str, names: tuple[str, ...], package: str) -> Comparison:
    try:
        other = explain(names[0], plan(py_executable), package)
    except NemoRLError as error:
        return Comparison(names, None, f"its venv cannot be resolved here: {str(error).partition(chr(10))[0]}")
    return Comparison(names, other, difference(explanation, other))


def show(result: Answer) -> None:
    """Print the answer as text."""
    explanation = result.explanation
    if explanation.version is None:
        hint = f" Did you mean {', '.join(result.near)}?" if result.near else ""
        display.print_line(f"{explanation.worker} does not have {explanation.package}.{hint}")
    else:
        display.print_line(f"{explanation.worker} gets {explanation.package} {explanation.version}")
        for route in explanation.routes:
            display.print_line(f"  through {route}")
        if explanation.source == "interpreter":
            display.print_line(f"  installed in the interpreter {explanation.spec}, which is not a managed venv")
        if explanation.replaced:
            display.print_line(f"  replaces {explanation.replaced} of the base venv")
        demands = [str(demand) for demand in explanation.demands]
        if demands:
            display.print_line(f"  required by {abbreviated(demands, _MAX_DEMANDS)}")
    if not result.others:
        return
    display.print_line()
    rows = []
    for comparison in result.others:
        other = comparison.explanation
        version = "?" if other is None else other.version or "none"
        for worker in comparison.workers:
            rows.append([worker, version, "same" if comparison.difference is None else "differs"])
    display.print_table(["other workers", explanation.package, ""], rows)
    for comparison in result.others:
        if comparison.difference is not None:
            display.print_line(f"\n{', '.join(comparison.workers)}:\n  {comparison.difference}")


def to_json(result: Answer) -> dict[str, Any]:
    """Convert the answer to JSON types."""
    return {
        **explanation_to_json(result.explanation),
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
