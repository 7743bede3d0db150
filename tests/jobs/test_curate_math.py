"""The curation job, from its command line to a file that the GRPO job reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nemo_rl.data.config import DataConfig, DatasetConfig
from nemo_rl.data.datasets import open_dataset
from nemo_rl.jobs.command_line import run_command
from nemo_rl.jobs.curate_math import CurateConfig, run_curate
from nemo_rl.pipelines.messy_math import write_messy_math

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "configs" / "curate_math.yaml"


def test_a_dry_run_describes_the_pipeline_and_starts_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    overrides = ["--dry-run", f"output_dir={tmp_path / 'out'}", "verify.sympy_versions=['1.13.3']"]
    assert run_command(CurateConfig, CONFIG, run_curate, overrides) == 0
    assert "CheckAnswers (sympy 1.13.3)" in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_wrong_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"output_dir={tmp_path / 'out'}", f"input.paths=[{tmp_path / 'nowhere.jsonl'}]"]
    assert run_command(CurateConfig, CONFIG, run_curate, overrides) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["actor_pool", "ray_data"])
def test_a_messy_sample_becomes_training_data(tmp_path: Path, executor: str) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "examples" / "run_curate_math.py"), f"output_dir={out}"]
    command += ["input.sample.num_lines=400", "input.task_size=20KiB", f"executor={executor}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
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
