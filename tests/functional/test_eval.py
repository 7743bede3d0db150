"""`nemo-rl eval` on a run, a checkpoint and the embedded model: real processes, real Ray, real venvs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from grpo_jobs import ROOT, SMALL, metrics, run

from nemo_rl.observability.rollout_files import read_rollouts

COMPARED = ("accuracy", "completion_length", "truncated")


def evaluate(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / "run_eval.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)


def scores(directory: Path) -> dict:
    return json.loads((directory / "scores.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    done = run(*SMALL, "grpo.max_num_steps=2", "policy.optimizer.lr=1e-3", f"logger.log_dir={directory}")
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.fixture(scope="module")
def compared(trained: Path) -> Path:
    """Return the directory of an evaluation of the run and of the model that it started from."""
    directory = trained.parent / "compared"
    done = evaluate(trained, "embedded", f"logger.log_dir={directory}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "difference to" in done.stdout
    return directory


@pytest.mark.slow  # starts jobs
def test_scores_are_those_of_the_validation(trained, compared):
    validations = {record["step"]: record for record in metrics(trained) if "val/accuracy" in record}
    for model, step in zip(scores(compared)["models"], (2, 0), strict=True):
        for metric in COMPARED:
            assert model["scores"][metric]["value"] == pytest.approx(validations[step][f"val/{metric}"]), metric


@pytest.mark.slow  # starts jobs
def test_scores_are_stored_with_digests_samples_and_report(trained, compared):
    first, second = scores(compared)["models"]
    assert first["model"] == str(trained / "checkpoints" / "step_000002" / "policy" / "model")
    assert second["label"] == "embedded"
    assert first["weights_digest"] != second["weights_digest"]
    assert first["venv_digests"].keys() == {"generation", "environment"}
    assert first["scores"]["accuracy"]["num_problems"] == first["num_samples"] == 16
    samples = list(read_rollouts([compared / "rollouts" / "step_000002.parquet"], ("reward", "outcome", "messages")))
    assert len(samples) == 16
    assert {sample["outcome"] for sample in samples} == {"scored"}
    assert sum(sample["reward"] > 0 for sample in samples) == round(16 * second["scores"]["accuracy"]["value"])
    assert "<svg" in (compared / "report.html").read_text()


@pytest.mark.slow  # starts jobs
def test_same_command_on_a_finished_evaluation_has_nothing_to_do(trained, compared):
    before = (compared / "scores.json").read_bytes()
    done = evaluate(trained, "embedded", f"logger.log_dir={compared}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is finished" in done.stderr
    assert "Ray" not in done.stdout
    assert (compared / "scores.json").read_bytes() == before


@pytest.mark.slow  # starts jobs
def test_killed_evaluation_continues_with_the_model_that_is_not_finished(trained, compared):
    complete = scores(compared)
    # The files as a kill during the second model leaves them.
    (compared / "finished.json").unlink()
    partial = {**complete, "models": complete["models"][:1], "differences": []}
    (compared / "scores.json").write_text(json.dumps(partial))
    done = evaluate(trained, "embedded", f"logger.log_dir={compared}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("evaluating ") == 1
    again = scores(compared)
    for before, after in zip(complete["models"], again["models"], strict=True):
        assert after["scores"] == before["scores"]
        assert after["weights_digest"] == before["weights_digest"]
    assert again["differences"] == complete["differences"]


@pytest.mark.slow  # starts jobs
def test_several_completions_of_an_environment_with_turns(tmp_path):
    directory = tmp_path / "game"
    done = evaluate(
        "embedded-chat",
        *("--config", "grpo_guess_number"),
        *("eval.num_generations=4", "eval.max_num_problems=6"),
        f"logger.log_dir={directory}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [model] = scores(directory)["models"]
    assert {"pass@1", "pass@2", "pass@4"} <= model["scores"].keys()
    assert model["scores"]["pass@1"]["value"] == pytest.approx(model["scores"]["accuracy"]["value"])
    assert list(model["environments"]) == ["guess_number"]
    assert model["num_samples"] == 24
