"""The embedded job with Megatron-Core as trainer, as a user runs it: two policy workers that share every matrix."""

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
        env={**os.environ, "RAY_ADDRESS": "local"},  # a cluster of its own, whatever else runs on the machine
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(directory: Path, *arguments: str) -> None:
    job = start(directory, *arguments)
    try:
        _, errors = job.communicate(timeout=280)
    finally:
        job.kill()  # where the test gave up; does nothing to a job that has ended
    assert job.returncode == 0, errors[-3000:]


def steps(directory: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if "train/loss" in record}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("megatron") / "run"
    run(directory, "grpo.max_num_steps=3")
    return directory


def test_megatron_and_torch_workers_train_together_each_in_its_venv(undisturbed: Path) -> None:
    found = steps(undisturbed)
    assert sorted(found) == [1, 2, 3]
    assert found[1]["train/logprob_error"] < 1e-4
    workers = json.loads((undisturbed / "attestation.json").read_text())
    policy = [worker for worker in workers if worker["group"] == "policy"]
    assert [worker["tensor_rank"] for worker in policy] == [0, 1]
    assert all(worker["megatron_core"] for worker in policy)
    prefixes = {worker["group"]: worker["prefix"] for worker in workers if "prefix" in worker}
    assert prefixes["policy"] != prefixes["generation"]


def test_transformers_loads_the_checkpoint(undisturbed: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = undisturbed / "checkpoints" / "step_000003" / "policy" / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory).vocab_size <= model.config.vocab_size


def assert_same_run(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert sorted(found) == sorted(expected)
    for step, record in expected.items():
        assert found[step]["train/reward"] == record["train/reward"]
        assert found[step]["train/loss"] == pytest.approx(record["train/loss"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)  # three starts of a whole job
def test_a_run_with_pipeline_stages_goes_on_where_it_stopped(undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run(directory, "grpo.max_num_steps=2", *PIPELINE)
    run(directory, "grpo.max_num_steps=3", *PIPELINE)
    assert_same_run(steps(directory), steps(undisturbed))


@pytest.mark.slow
@pytest.mark.timeout(900)  # three starts of a whole job
def test_a_lost_rank_stops_the_job_and_the_same_command_resumes_it(undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    job = start(directory, "grpo.max_num_steps=3")
    deadline = time.monotonic() + 200
    while not (directory / "checkpoints" / "step_000001").exists():
        assert job.poll() is None, f"the job ended early: {job.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.1)
    ranks = running("MegatronPolicyWorker", psutil.Process(job.pid).children(recursive=True))
    assert len(ranks) == 2
    ranks[1].kill()
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1, "the job must end although the other rank waits for the lost one"
    assert "policy" in errors
    _, left = psutil.wait_procs(ranks, timeout=60)
    assert not left, "the other rank must not stay behind"
    run(directory, "grpo.max_num_steps=3")
    assert_same_run(steps(directory), steps(undisturbed))
