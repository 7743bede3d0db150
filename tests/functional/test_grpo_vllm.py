"""Runs the GRPO job with three Pythons: torch trains, vLLM generates, the driver's Python grades."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def test_embedded_job_runs_with_vllm(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    arguments = [
        "--config=examples/configs/grpo_math_cpu_vllm.yaml",
        "grpo.max_num_steps=3",
        "grpo.num_prompts_per_step=8",
        "grpo.stream_rollouts=true",
        "grpo.logprob_check.period=1",
        "grpo.logprob_check.max_mean_error=1e-4",
        "grpo.validation.period=3",
        "grpo.validation.max_num_problems=32",
        f"logger.log_dir={directory}",
    ]
    done = subprocess.run(
        [sys.executable, "examples/run_grpo_math.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all(record["train/logprob_error"] < 1e-4 for record in steps)
    workers = json.loads((directory / "attestation.json").read_text())
    engines = {worker["group"]: worker.get("engine", "") for worker in workers}
    assert engines["generation"].startswith("vLLM ")
    assert len({worker["executable"] for worker in workers}) == 3
