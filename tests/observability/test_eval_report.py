import json
from pathlib import Path

import pytest

from nemo_rl.algorithms.evaluation import ProblemScore
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.eval_results import EvalResults
from nemo_rl.jobs.eval_view import print_scores
from nemo_rl.observability.eval_report import write_eval_report
from nemo_rl.observability.rollout_files import RolloutFiles


def record(model: str, step: int) -> dict:
    return {
        "model": model,
        "label": model,
        "step": step,
        "weights_digest": f"digest of {model}",
        "precision": "float32",
        "venv_digests": {"generation": ["0123456789abcdef"], "environment": [None]},
        "num_problems": 2,
        "num_samples": 2,
        "num_failed": 0,
    }


def scores(*values: float) -> list[ProblemScore]:
    return [
        ProblemScore("math", index, "sums" if index % 2 else "<products>", {"accuracy": value, "reward": value})
        for index, value in enumerate(values)
    ]


def sample(reward: float, completion: str) -> dict:
    messages = [{"role": "user", "content": "1<2?"}, {"role": "assistant", "content": completion}]
    return {"environment": "math", "group": 0, "branch": 0, "reward": reward, "messages": messages, "failure": ""}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    results = EvalResults(tmp_path)
    results.check_problems({"math": "aa"})
    files = RolloutFiles(tmp_path, limit_mb=1, resume_step=None)
    for step, (name, values) in enumerate([("start", (0.0, 1.0, 0.0)), ("trained", (1.0, 1.0, 0.0))], 1):
        files.write(step, [sample(values[0], f"<b>{name}</b>")])
        results.add(record(name, step), scores(*values))
    return tmp_path


def test_results_are_read_again(evaluation):
    results = EvalResults(evaluation)
    assert results.finished == ["start", "trained"]
    first, second = results.content["models"]
    assert first["scores"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert second["subjects"]["sums"]["accuracy"] == {"value": 1.0, "low": None, "high": None, "num_problems": 1}
    [difference] = results.content["differences"]
    assert (difference["model"], difference["baseline"]) == ("trained", "start")
    assert difference["scores"]["accuracy"]["value"] == pytest.approx(1 / 3)
    lines = (evaluation / "problems" / "step_000002.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["values"] == {"accuracy": 1.0, "reward": 1.0}


def test_changed_problems_are_an_error(evaluation):
    results = EvalResults(evaluation)
    results.check_problems({"math": "aa"})
    with pytest.raises(ConfigError, match="the problems have changed since the evaluation in .* set another"):
        results.check_problems({"math": "bb"})


def test_report_has_pictures_tables_digests_and_completions(evaluation):
    page = write_eval_report(evaluation).read_text()
    assert page.count("<svg") == 2  # all problems, and per subject
    assert "0.333 [" in page
    assert "+0.333 [" in page
    assert "digest of trained" in page
    assert "the driver" in page
    assert "&lt;b&gt;trained&lt;/b&gt;" in page
    assert "<b>trained</b>" not in page
    assert "&lt;products&gt;" in page


def test_report_without_scores_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="is not the directory of an evaluation"):
        write_eval_report(tmp_path)


def test_tables_of_the_terminal(evaluation, capsys):
    from rich.console import Console

    print_scores(EvalResults(evaluation).content, Console(width=160))
    output = capsys.readouterr().out
    assert "difference to start" in output
    assert "accuracy of subjects" in output
    assert "reward" not in output  # equal to the accuracy
