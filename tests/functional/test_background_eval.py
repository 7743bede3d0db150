"""Evaluation in the background of training jobs: real processes, real Ray, real venvs, on the embedded models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from grpo_jobs import ROOT, SMALL, command, has_saved, metrics, orphans, run, wait_for

EVALUATED = ("eval.period=1", "eval.max_num_problems=16", "eval.num_generations=2", "eval.generation.num_threads=1")


def scores(directory: Path) -> dict:
    return json.loads((directory / "scores.json").read_text())


def evaluated(directory: Path) -> dict[int, float]:
    """Return the accuracy by step in `metrics.jsonl`, and check that no step is there twice."""
    records = [record for record in metrics(directory) if "eval/accuracy" in record]
    by_step = {record["step"]: record["eval/accuracy"] for record in records}
    assert len(by_step) == len(records)
    return by_step


@pytest.mark.slow  # starts jobs
def test_scores_are_those_of_the_command_on_the_checkpoint(tmp_path):
    directory = tmp_path / "run"
    arguments = (*SMALL, *EVALUATED, "grpo.max_num_steps=3", f"logger.log_dir={directory}")
    done = run(*arguments, "policy.optimizer.lr=1e-3")
    assert done.returncode == 0, done.stderr[-3000:]
    content = scores(directory / "eval")
    by_step = {model["step"]: model for model in content["models"]}
    left_out = {skipped["step"] for skipped in content["not_evaluated"]}
    assert by_step.keys() | left_out == {0, 1, 2, 3}
    assert 3 in by_step
    assert not by_step.keys() & left_out
    assert evaluated(directory) == {step: model["scores"]["accuracy"]["value"] for step, model in by_step.items()}
    groups = {worker["group"] for worker in json.loads((directory / "attestation.json").read_text())}
    assert {"generation", "evaluation generation", "evaluation environment"} <= groups
    assert "measured in the background" in (directory / "report.html").read_text()
    assert (directory / "eval" / "report.html").exists()

    again = tmp_path / "again"
    options = ("--step", "3", f"logger.log_dir={again}")
    script = str(ROOT / "examples" / "run_eval.py")
    done = subprocess.run(
        [sys.executable, script, str(directory), *options], capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [model] = scores(again)["models"]
    for key in ("scores", "weights_digest", "venv_digests", "num_samples"):
        assert model[key] == by_step[3][key], key


@pytest.mark.slow  # starts jobs
def test_killed_asynchronous_run_records_every_step_once(tmp_path):
    directory = tmp_path / "run"
    arguments = (
        *SMALL,
        *EVALUATED,
        "grpo.max_num_steps=6",
        "grpo.max_trajectory_age=1",
        "policy.lora.rank=4",  # generation gets adapters, the evaluation gets merged weights
        f"logger.log_dir={directory}",
    )
    job = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: has_saved(directory, 2), job)
    job.kill()
    job.wait()
    wait_for(lambda: not orphans(job.pid), None, seconds=300)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    content = scores(directory / "eval")
    steps = [model["step"] for model in content["models"]]
    left_out = [skipped["step"] for skipped in content["not_evaluated"]]
    assert sorted(steps + left_out) == list(range(7))
    assert sorted(evaluated(directory)) == sorted(steps)
    files = {path.stem for path in (directory / "eval" / "rollouts").iterdir()}
    assert files == {f"step_{step:06d}" for step in steps}


@pytest.mark.slow  # starts a job
def test_supervised_fine_tuning_is_evaluated_with_an_environment(tmp_path):
    directory = tmp_path / "run"
    done = run(
        *("sft.max_num_steps=4", "sft.num_records_per_step=8", "checkpointing.enabled=false"),
        *("eval.period=4", "eval.max_num_problems=8", "policy.generation.max_new_tokens=16"),
        *("eval.data.train.kind=seeds", "eval.data.max_prompt_length=40"),
        *("eval.env.guess.class=nemo_rl.environments.games.GuessNumber", "eval.env.guess.max_turns=2"),
        f"logger.log_dir={directory}",
        script=ROOT / "examples" / "run_sft.py",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(evaluated(directory)) == [0, 4]
    assert [*scores(directory / "eval")["models"][0]["environments"]] == ["guess"]
