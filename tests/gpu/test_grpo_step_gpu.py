"""Tests full GRPO steps on one GPU, in this process: the real loop, policy worker and generator."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from one_process import ModelSize, make_job, write_llama

from nemo_rl.algorithms.config import MasterConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 3
SIZE = ModelSize(512, 4, 8, 128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Write a model; returns its directory and number of parameters."""
    directory = tmp_path_factory.mktemp("llama")
    return directory, write_llama(directory, SIZE, 64)


def run(model: Path, **policy: Any) -> tuple[list[dict[str, float]], list[int]]:
    """Run a job; returns the metrics of each step, and the bytes allocated when each generation began."""
    config = MasterConfig.model_validate(
        {
            "grpo": {
                "max_num_steps": STEPS,
                "num_prompts_per_step": 8,
                "num_generations_per_prompt": 8,
                "num_updates_per_step": 2,
                "logprob_check": {"period": 1, "max_mean_error": 0.1},
            },
            "policy": {
                "max_sequence_length": 64,
                "optimizer": {"lr": 1e-4},
                "generation": {"max_new_tokens": 32},
                **policy,
            },
            "data": {"max_prompt_length": 24},
            "loss": {"kl_coef": 0.1},
        }
    )
    before = torch.cuda.memory_allocated()
    job = make_job(model, config, "cuda")
    allocated: list[int] = []
    generate = job.generation.generate

    def record_and_generate(*args: Any, **kwargs: Any) -> Any:
        allocated.append(torch.cuda.memory_allocated() - before)
        return generate(*args, **kwargs)

    job.generation.generate = record_and_generate  # type: ignore[method-assign]
    assert job.run() == f"all {STEPS} steps are done"
    recorder: Any = job.recorder
    return recorder.steps, allocated


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_steps_train_and_logprobs_agree(
    model: tuple[Path, int], precision: str, bound: float, sharding: str, offload: bool
) -> None:
    metrics, _ = run(model[0], precision=precision, sharding=sharding, offload=offload)
    assert len(metrics) == STEPS
    for step in metrics:
        assert all(math.isfinite(value) for value in step.values())
        assert step["train/logprob_error"] < bound
        assert step["train/grad_norm"] > 0


def test_offload_frees_memory_for_generation(model: tuple[Path, int]) -> None:
    directory, num_parameters = model
    _, without_offload = run(directory, offload=False)
    gc.unfreeze()
    gc.collect()
    _, with_offload = run(directory, offload=True)
    # Offloaded from the second step on: weights, two moments, and the reference policy's weights.
    assert without_offload[-1] - with_offload[-1] > 0.9 * 16 * num_parameters
