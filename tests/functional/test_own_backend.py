"""Runs the example of docs/adding-a-backend.md with the command of the page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_backend_in_one_file_trains(tmp_path):
    command = [
        sys.executable,
        "examples/backends/run_with_transformers_generation.py",
        "grpo.max_num_steps=3",
        "grpo.num_prompts_per_step=4",
        "grpo.num_generations_per_prompt=4",
        "grpo.logprob_check={period: 1, max_mean_error: 1.0e-4}",
        "grpo.validation={at_start: false, max_num_problems: 8}",
        f"logger.log_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/logprob_error" in r] == [1, 2, 3]
    workers = json.loads((tmp_path / "run" / "attestation.json").read_text())
    assert any("TransformersGenerationWorker" in w["fqn"] for w in workers)
