"""Tests the curation job from its command line to a file that a GRPO job trains on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nemo_rl.data.config import DataConfig, DatasetConfig
from nemo_rl.data.datasets import open_dataset
from nemo_rl.data.sample_math import write_messy_math
from nemo_rl.jobs.command_line import run_command
from nemo_rl.jobs.curate_math import CurateConfig, run_curate

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "configs" / "curate_math.yaml"


def test_dry_run_prints_the_pipeline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    overrides = ["--dry-run", f"output_dir={tmp_path / 'out'}", "verify.sympy_versions=['1.13.3']"]
    assert run_command(CurateConfig, CONFIG, run_curate, overrides) == 0
    assert "CheckAnswers (sympy 1.13.3)" in caplog.text
    assert not (tmp_path / "out").exists()


def test_missing_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"output_dir={tmp_path / 'out'}", f"input.paths=[{tmp_path / 'nowhere.jsonl'}]"]
    assert run_command(CurateConfig, CONFIG, run_curate, overrides) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["actor_pool", "ray_data"])
def test_raw_sample_becomes_training_data(tmp_path: Path, executor: str) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "examples" / "run_curate_math.py"), f"output_dir={out}"]
    command += ["input.sample.num_lines=400", "input.task_size=20KiB", f"executor={executor}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    counts = write_messy_math(tmp_path / "same.jsonl", 400).counts
    expected = counts["good"] + counts["wrongly decoded"] + counts["other encoding"]
    frame = pq.read_table(out / "problems.parquet").to_pandas()
    assert abs(len(frame) - expected) <= 2 + 0.02 * expected
    assert not frame["problem"].str.contains("Ã|&#").any()
    assert set(frame["checked_by_0"]) == {"sympy 1.13.3"}
    assert set(frame["checked_by_1"]) == {"sympy 1.12.1"}
    assert frame["difficulty"].between(1, 5).all()
    assert frame["difficulty"].nunique() > 2
    problems = open_dataset(DatasetConfig(path=str(out / "problems.parquet")), DataConfig(), "train")
    assert len(problems) == len(frame)
    page = (out / "report.html").read_text()
    for reason in ("near duplicate", "broken line", "no answer", "answer is not the solution"):
        assert reason in page


@pytest.mark.slow
def test_from_raw_data_to_a_trained_model(tmp_path: Path) -> None:
    """Run docs/tutorial.md in a short form: score problems with a model, then train the model on them."""
    out, run = tmp_path / "out", tmp_path / "run"
    curate = ["examples/run_curate_math.py", "--config", "examples/configs/curate_arithmetic.yaml"]
    curate += [f"output_dir={out}", "input.sample.num_lines=700", "languages=[en]"]
    train = ["examples/run_grpo_math.py", f"data.train.path={out / 'problems.parquet'}", f"logger.log_dir={run}"]
    train += [f"data.validation.path={out / 'held_out.parquet'}", "grpo.max_num_steps=3", "grpo.num_prompts_per_step=8"]
    for command in (curate, train):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    problems, held_out = (pq.read_table(out / f"{name}.parquet").to_pandas() for name in ("problems", "held_out"))
    assert len(problems) > len(held_out) > 0
    assert set(problems["problem"]).isdisjoint(held_out["problem"])
    assert problems["pass_rate"].between(0.1, 0.9).all()
    assert problems["difficulty"].between(1, 5).all()
    assert set(problems["language"]) == {"und"}  # a formula has no language
    assert "solved in less than 10% of the samples" in (out / "report.html").read_text()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3]
    assert records[0]["val/accuracy"] > 0
    assert list((run / "checkpoints").glob("step_000003/policy/**/config.json"))


def test_missing_scoring_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--dry-run", "scoring.model=/no/such/model"]
    assert run_command(CurateConfig, CONFIG, run_curate, overrides) == 2
    assert "scoring.model: there is no directory /no/such/model" in capsys.readouterr().err
