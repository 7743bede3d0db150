"""The real loop with the real policy worker and generator, in this process, without Ray (`benchmarks/one_process`)."""

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
    """What is recorded of each step, without what depends on time."""
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
        return [{name: value for name, value in step.items() if name.startswith("train/")} for step in recorder.of_step]
    finally:
        job.policy.shutdown()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_run_in_which_the_policy_leaves_is_the_same_run(model: Path, sharding: str) -> None:
    stays = run(model, sharding=sharding)
    assert not dist.is_initialized()
    leaves = run(model, sharding=sharding, offload=True)
    assert leaves == stays
    assert [step["train/grad_norm"] > 0 for step in stays] == [True] * STEPS
