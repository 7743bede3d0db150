"""The recipe of examples/recipes as a user runs it, killed in the middle and started again."""

import json
import subprocess

import pytest
from grpo_jobs import ROOT, command, has_saved, metrics, orphans, run, wait_for

SCRIPT = ROOT / "examples" / "recipes" / "raw_text_to_scored_model.py"
SMALL = (
    "curate:input.sample.num_lines=800",
    "curate:verify.sympy_versions=[1.13.3]",
    "sft:sft.num_records_per_step=16",
    "sft:sft.max_num_steps=30",
    "sft:checkpointing.save_period=1",
    "grpo:grpo.num_prompts_per_step=4",
    "grpo:grpo.num_generations_per_prompt=4",
    "grpo:grpo.max_num_steps=2",
    "grpo:grpo.validation.max_num_problems=8",
    "grpo:policy.train_global_batch_size=null",
    "grpo:grpo.dynamic_sampling.max_generation_batches=2",
    "eval:eval.max_num_problems=8",
)


@pytest.mark.slow  # starts jobs
def test_killed_recipe_continues_and_scores_three_models(tmp_path):
    arguments = ("--output", str(tmp_path), *SMALL)
    recipe = subprocess.Popen(
        command(*arguments, script=SCRIPT), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: has_saved(tmp_path / "sft", 1), recipe)
    recipe.kill()
    recipe.wait()
    wait_for(lambda: not orphans(recipe.pid), None, seconds=300)
    curated = (tmp_path / "curated" / "problems.parquet").stat()

    done = run(*arguments, script=SCRIPT)

    assert done.returncode == 0, done.stderr[-3000:]
    assert "stage 1 of 4: nemo-rl curate is finished" in done.stdout
    assert (tmp_path / "curated" / "problems.parquet").stat().st_mtime_ns == curated.st_mtime_ns
    assert "resuming from" in done.stderr
    steps = [record["step"] for record in metrics(tmp_path / "sft") if "train/loss" in record]
    assert steps == list(range(1, 31))
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert len(scores["models"]) == 3
    again = run(*arguments, script=SCRIPT)
    assert again.returncode == 0
    assert again.stdout.count("is finished") == 4


def test_override_of_an_unknown_stage_is_refused(tmp_path):
    done = run("--output", str(tmp_path / "new"), "stf:sft.seed=1", script=SCRIPT)
    assert done.returncode == 2
    assert "'stf:sft.seed=1' does not begin with the name of a stage" in done.stderr
    assert not (tmp_path / "new").exists()
