"""Runs the default GRPO job with Megatron-Core and tensor parallelism over two policy workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import running

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # some start a job three times

CONFIG = ROOT / "examples" / "configs" / "grpo_math_cpu_megatron.yaml"
SMALL = (
    "grpo.num_prompts_per_step=4",
    "grpo.num_generations_per_prompt=4",
    "grpo.validation.period=2",
    "grpo.validation.max_num_problems=16",
    "grpo.logprob_check.max_mean_error=1e-4",
    "policy.train_micro_batch_size=5",
    "checkpointing.save_period=1",
)
PIPELINE = ("policy.options.tensor_parallel_size=1", "policy.options.pipeline_parallel_size=2")


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "examples" / "run_grpo_math.py"), "--config", str(CONFIG), *SMALL),
            *(f"logger.log_dir={directory}", *arguments),
        ],
        env={**os.environ, "RAY_ADDRESS": "local"},  # start a separate cluster
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(directory: Path, *arguments: str) -> None:
    job = start(directory, *arguments)
    try:
        _, errors = job.communicate(timeout=800)
    finally:
        job.kill()  # no effect on a job that has ended
    assert job.returncode == 0, errors[-3000:]


def steps(directory: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if "train/loss" in record}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("megatron") / "run"
    run(directory, "grpo.max_num_steps=3")
    return directory


def test_megatron_and_torch_workers_use_separate_venvs(uninterrupted: Path) -> None:
    records = steps(uninterrupted)
    assert sorted(records) == [1, 2, 3]
    assert records[1]["train/logprob_error"] < 1e-4
    workers = json.loads((uninterrupted / "attestation.json").read_text())
    policy = [worker for worker in workers if worker["group"] == "policy"]
    assert [worker["tensor_rank"] for worker in policy] == [0, 1]
    assert all(worker["megatron_core"] for worker in policy)
    prefixes = {worker["group"]: worker["prefix"] for worker in workers if "prefix" in worker}
    assert prefixes["policy"] != prefixes["generation"]


def test_transformers_loads_the_checkpoint(uninterrupted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = uninterrupted / "checkpoints" / "step_000003" / "policy" / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory).vocab_size <= model.config.vocab_size


def assert_same_run(actual: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert sorted(actual) == sorted(expected)
    for step, record in expected.items():
        assert actual[step]["train/reward"] == record["train/reward"]
        assert actual[step]["train/loss"] == pytest.approx(record["train/loss"], rel=1e-3, abs=1e-5)


def test_run_with_pipeline_stages_resumes(uninterrupted: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run(directory, "grpo.max_num_steps=2", *PIPELINE)
    run(directory, "grpo.max_num_steps=3", *PIPELINE)
    assert_same_run(steps(directory), steps(uninterrupted))


def test_lost_rank_stops_the_job_which_can_resume(uninterrupted: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    job = start(directory, "grpo.max_num_steps=3")
    deadline = time.monotonic() + 600
    while not (directory / "checkpoints" / "step_000001").exists():
        assert job.poll() is None, f"the job ended early: {job.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.1)
    ranks = running("MegatronPolicyWorker", psutil.Process(job.pid).children(recursive=True))
    assert len(ranks) == 2
    ranks[1].kill()
    _, errors = job.communicate(timeout=400)
    assert job.returncode == 1, "the job must end although the other rank waits for the lost rank"
    assert "policy" in errors
    _, alive = psutil.wait_procs(ranks, timeout=400)
    assert not alive, "the other rank must end as well"
    run(directory, "grpo.max_num_steps=3")
    assert_same_run(steps(directory), steps(uninterrupted))
