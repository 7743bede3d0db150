"""Writes `report.html` of an evaluation from the files in its directory::

DIR/
  scores.json                   per model: weights digest, venv digests, scores with intervals; differences
  problems/step_000001.jsonl    the values of every problem of the first model, ...
  rollouts/step_000001.parquet  its samples, which `nemo-rl rollouts` reads
  config.yaml  attestation.json  timeline.jsonl  report.html
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nemo_rl
from nemo_rl.errors import ConfigError
from nemo_rl.observability import report_figures as figures
from nemo_rl.observability.report import REPORT_FILE, SCORES_FILE, report_template
from nemo_rl.observability.report_conversations import shortened
from nemo_rl.observability.rollout_files import find_rollouts, message_text, read_rollouts
from nemo_rl.utils.files import write_atomically

# Metrics in tokens or of little interest for a comparison: not in the tables.
_HIDDEN = ("truncated",)
# Equal to the accuracy if all rewards are 0 or 1, and if no sample has failed.
_ACCURACIES = ("reward", "pass@1")
_NOT_FRACTIONS = ("reward", "completion_length", *_HIDDEN)


def problems_file(directory: Path, step: int) -> Path:
    """Return the file with the values of every problem of the model with this number."""
    return directory / "problems" / f"step_{step:06d}.jsonl"


def write_eval_report(directory: Path, num_samples: int = 8) -> Path:
    """Write `directory/report.html`, atomically, and return its path.

    Args:
        directory: directory of the evaluation.
        num_samples: problems whose completions are shown.

    Raises:
        ConfigError: the directory has no scores.
    """
    path = directory / SCORES_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory} is not the directory of an evaluation: {path} cannot be read ({error})"
        ) from error
    target = directory / REPORT_FILE
    write_atomically(target, render(directory, content, num_samples))
    return target


def render(directory: Path, content: Mapping[str, Any], num_samples: int) -> str:
    """Return the page as HTML."""
    models, metrics = content["models"], shown_metrics(content)
    fractions = [metric for metric in metrics if metric not in _NOT_FRACTIONS]
    labels = {model["model"]: model["label"] for model in models}
    pairs = [{**pair, "label": labels[pair["model"]]} for pair in content["differences"]]
    return report_template("nemo_rl.observability", "eval_template.html").render(
        title=" / ".join(directory.resolve().parts[-2:]),
        version=nemo_rl.__version__,
        models=models,
        metrics=metrics,
        pairs=pairs,
        picture=figures.score_bars(fractions, {m["label"]: m["scores"] for m in models}),
        groups=[group for key in ("environments", "subjects") if (group := _groups(models, key))],
        samples=_samples(directory, [model["step"] for model in models], num_samples),
        score_text=score_text,
    )


def shown_metrics(content: Mapping[str, Any]) -> list[str]:
    """Return the metrics for tables: without the reward and pass@1 if they equal the accuracy."""
    scores = [model["scores"] for model in content["models"]]
    names = list(dict.fromkeys(metric for metrics in scores for metric in metrics))
    return [
        name
        for name in names
        if name not in _HIDDEN and not (name in _ACCURACIES and all(_equals_accuracy(name, each) for each in scores))
    ]


def _equals_accuracy(name: str, scores: Mapping[str, Any]) -> bool:
    ends = ("value", "low", "high", "num_problems")
    return {*scores} >= {name, "accuracy"} and all(
        math.isclose(scores[name][end] or 0.0, scores["accuracy"][end] or 0.0, abs_tol=1e-9) for end in ends
    )


def score_text(score: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Format a score with its interval.

    Example:
        >>> score_text({"value": 0.5, "low": 0.41, "high": 0.59, "num_problems": 100})
        '0.500 [0.410, 0.590]'
    """
    if score is None:
        return ""
    form = "{:+.3f}" if signed else "{:.3f}"
    value = form.format(score["value"])
    if score["low"] is None:
        return value
    return f"{value} [{form.format(score['low'])}, {form.format(score['high'])}]"


def _groups(models: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    """Return a table and a picture of the accuracy per environment or subject; None for a single environment."""
    names = list(dict.fromkeys(name for model in models for name in model[key]))
    if not names or (key == "environments" and len(names) == 1):
        return None
    columns = {
        model["label"]: {name: group["accuracy"] for name, group in model[key].items() if "accuracy" in group}
        for model in models
    }
    rows = [{"name": name, "scores": [column.get(name) for column in columns.values()]} for name in names]
    return {"key": key, "rows": rows, "picture": figures.score_bars(names, columns)}


def _samples(directory: Path, steps: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Return the first completion of the first problems, of every model."""
    files = find_rollouts(directory)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    columns = ("step", "environment", "group", "branch", "reward", "messages")
    for column, step in enumerate(steps):
        counted: dict[str, set[int]] = {}
        for sample in read_rollouts([files[step]] if step in files else [], columns):
            chosen = counted.setdefault(sample["environment"], set())
            if sample["branch"] or sample["group"] in chosen or len(chosen) == count:
                continue
            chosen.add(sample["group"])
            first, *rest = [message_text(message) for message in sample["messages"]] or [""]
            place = (sample["environment"], sample["group"])
            row = rows.setdefault(place, {"prompt": shortened(first), "completions": [None] * len(steps)})
            row["completions"][column] = {"reward": sample["reward"], "completion": shortened("\n".join(rest))}
    return list(rows.values())
