"""Runs the GRPO loop with real policy and generation workers in this process (`benchmarks/one_process`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from one_process import SIZES, make_job, write_llama

from nemo_rl.algorithms.config import MasterConfig

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_llama(directory, SIZES["tiny"], 64)
    return directory


def run(model: Path, **policy: Any) -> list[dict[str, float]]:
    """Train, and return the metrics of each step except timings."""
    config = MasterConfig.model_validate(
        {
            "grpo": {
                "max_num_steps": STEPS,
                "num_prompts_per_step": 4,
                "num_generations_per_prompt": 4,
                "num_updates_per_step": 2,
                "logprob_check": {"period": 1},
            },
            "policy": {
                "num_threads": 1,
                "max_sequence_length": 64,
                "optimizer": {"lr": 1e-3},
                "generation": {"max_new_tokens": 16},
                **policy,
            },
            "data": {"max_prompt_length": 24},
            "loss": {"kl_coef": 0.1},
        }
    )
    job = make_job(model, config, "cpu")
    try:
        assert job.run() == f"all {STEPS} steps are done"
        recorder: Any = job.recorder
        return [{name: value for name, value in step.items() if name.startswith("train/")} for step in recorder.steps]
    finally:
        job.policy.shutdown()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_offloading_does_not_change_the_run(model: Path, sharding: str) -> None:
    resident = run(model, sharding=sharding)
    assert not dist.is_initialized()
    offloaded = run(model, sharding=sharding, offload=True)
    assert offloaded == resident
    assert [step["train/grad_norm"] > 0 for step in resident] == [True] * STEPS
