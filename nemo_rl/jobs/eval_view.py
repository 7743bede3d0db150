"""Prints the tasks and the scores of an evaluation as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from nemo_rl.jobs.model_sources import label
from nemo_rl.observability.eval_report import score_text, shown_metrics

if TYPE_CHECKING:
    from nemo_rl.algorithms.eval_config import EvalConfig
    from nemo_rl.data.problem import ProblemDataset
    from nemo_rl.jobs.roles import Role


def print_tasks(
    config: EvalConfig, roles: Sequence[Role], problems: Mapping[str, ProblemDataset], console: Console
) -> None:
    """Print what an evaluation would do."""
    models = _table("models", "model")
    for name in config.eval.models:
        models.add_row(label(name))
    workers = _table("workers", "role", "workers", "worker class", "py_executable")
    for role in roles:
        workers.add_row(role.name, str(role.num_workers), role.fqn, role.py_executable)
    tasks = _table("problems", "environment", "problems")
    limit = config.eval.max_num_problems
    most = None if limit is None else max(limit // len(problems), 1)
    for name, dataset in problems.items():
        tasks.add_row(name, str(len(dataset) if most is None else min(most, len(dataset))))
    console.print(Group(models, workers, tasks, Text(f"{config.eval.num_generations} completions per problem")))


def print_scores(content: Mapping[str, Any], console: Console) -> None:
    """Print the content of `scores.json`: scores, differences, and accuracy per environment and subject."""
    models, metrics = content["models"], shown_metrics(content)
    table = _table("scores, with 95 % confidence intervals", "model", *metrics)
    for model in models:
        table.add_row(model["label"], *(score_text(model["scores"].get(metric)) for metric in metrics))
    parts = [table]
    labels = {model["model"]: model["label"] for model in models}
    if content["differences"]:
        table = _table(f"difference to {models[0]['label']}", "model", *metrics)
        for pair in content["differences"]:
            scores = (score_text(pair["scores"].get(metric), signed=True) for metric in metrics)
            table.add_row(labels[pair["model"]], *scores)
        parts.append(table)
    for key in ("environments", "subjects"):
        names = list(models[0][key]) if models else []
        if len(names) > 1 or (names and key == "subjects"):
            table = _table(f"accuracy of {key}", key[:-1], "problems", *labels.values())
            for name in names:
                cells = [model[key].get(name, {}).get("accuracy") for model in models]
                number = str(cells[0]["num_problems"]) if cells[0] else ""
                table.add_row(name, number, *map(score_text, cells))
            parts.append(table)
    console.print(Group(*parts))


def summary_line(content: Mapping[str, Any]) -> str:
    """Return the scores of the last model in one line."""
    scores = content["models"][-1]["scores"]
    return ", ".join(f"{name} {score_text(scores[name])}" for name in shown_metrics(content) if name in scores)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
