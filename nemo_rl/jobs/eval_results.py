"""The results of an evaluation: `scores.json` and the values of every problem, written model by model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_rl.algorithms.evaluation import ProblemScore, differences, groups_of, summarize
from nemo_rl.errors import ConfigError
from nemo_rl.observability.eval_report import problems_file
from nemo_rl.observability.report import SCORES_FILE
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.jsonl import read_jsonl


class EvalResults:
    """Writes the scores of an evaluation, and reads those of an earlier attempt.

    A model is finished when `scores.json` has it. Its samples and the values of its problems are written before. The
    number of a model, `step`, is its place among the models, or in training the step of its weights.

    Attributes:
        content: the content of `scores.json`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, path = directory, directory / SCORES_FILE
        empty = {"format": 1, "problems": {}, "models": [], "differences": [], "not_evaluated": []}
        self.content: dict[str, Any] = empty
        if path.exists():
            try:
                self.content = empty | json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{path} cannot be read ({error}); remove it to evaluate again") from error

    @property
    def finished(self) -> list[str]:
        """The models that are finished."""
        return [record["model"] for record in self.content["models"]]

    @property
    def steps(self) -> set[int]:
        """The numbers of the models that are finished."""
        return {record["step"] for record in self.content["models"]}

    def keep_until(self, step: int | None) -> None:
        """Drop what belongs to later training steps; everything if it is None."""
        content = self.content
        for name in ("models", "not_evaluated"):
            content[name] = [record for record in content[name] if step is not None and record["step"] <= step]
        content["differences"] = [pair for pair in content["differences"] if pair["model"] in self.finished]
        if (self._directory / SCORES_FILE).exists():
            self._write()

    def leave_out(self, step: int, reason: str) -> None:
        """Record why the weights of a training step are not evaluated."""
        self._forget(step)
        self.content["not_evaluated"].append({"step": step, "reason": reason})
        self._write()

    def check_problems(self, digests: Mapping[str, str]) -> None:
        """Record the digests of the problems. Raises `ConfigError` if those of an earlier attempt differ."""
        if self.finished and self.content["problems"] != digests:
            raise ConfigError(
                f"the problems have changed since the evaluation in {self._directory} began; set another logger.log_dir"
            )
        self.content["problems"] = dict(digests)

    def add(self, record: dict[str, Any], scores: Sequence[ProblemScore]) -> None:
        """Add a finished model.

        Args:
            record: what was evaluated, with the keys `model` and `step`.
            scores: the values of its problems.
        """
        lines = "".join(json.dumps(asdict(score)) + "\n" for score in scores)
        write_atomically(problems_file(self._directory, record["step"]), lines)
        record = {**record, "scores": _summary(scores)}
        for name, attribute in (("environments", "environment"), ("subjects", "subject")):
            record[name] = {group: _summary(members) for group, members in groups_of(scores, attribute).items()}
        if self.content["models"]:
            baseline = self.content["models"][0]
            compared = differences(scores, self._problems(baseline["step"]))
            pair = {"model": record["model"], "baseline": baseline["model"]}
            plain = {metric: asdict(score) for metric, score in compared.items()}
            self.content["differences"].append({**pair, "scores": plain})
        self.content["models"].append(record)
        self._forget(record["step"])
        self._write()

    def _forget(self, step: int) -> None:
        """Drop the reason why a step was not evaluated earlier."""
        self.content["not_evaluated"] = [record for record in self.content["not_evaluated"] if record["step"] != step]

    def _write(self) -> None:
        write_atomically(self._directory / SCORES_FILE, json.dumps(self.content, indent=1))

    def _problems(self, step: int) -> list[ProblemScore]:
        return [ProblemScore(**record) for record in read_jsonl(problems_file(self._directory, step))]


def _summary(scores: Sequence[ProblemScore]) -> dict[str, Any]:
    return {metric: asdict(score) for metric, score in summarize(scores).items()}
