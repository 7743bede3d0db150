"""The embedded job with Megatron-Core as trainer, as a user runs it: two policy workers that share every matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def run(directory: Path, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "run_grpo_math.py"), "--config", str(CONFIG), *SMALL]
    done = subprocess.run(
        [*command, f"logger.log_dir={directory}", *arguments],
        env={**os.environ, "RAY_ADDRESS": "local"},  # a cluster of its own, whatever else runs on the machine
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


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


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), PIPELINE], ids=["tensor_parallel", "pipeline_parallel"])
def test_a_run_goes_on_where_it_stopped(undisturbed: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    directory = tmp_path / "run"
    run(directory, "grpo.max_num_steps=2", *layout)
    run(directory, "grpo.max_num_steps=3", *layout)
    resumed, expected = steps(directory), steps(undisturbed)
    assert sorted(resumed) == sorted(expected)
    for step in expected:
        assert resumed[step]["train/reward"] == expected[step]["train/reward"]
        assert resumed[step]["train/loss"] == pytest.approx(expected[step]["train/loss"], rel=1e-3, abs=1e-5)
