"""Whole GRPO steps on one GPU, in this process: the real loop, policy worker and generator."""

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
    """Where it is, and how many parameters it has."""
    directory = tmp_path_factory.mktemp("llama")
    return directory, write_llama(directory, SIZE, 64)


def run(model: Path, **policy: Any) -> tuple[list[dict[str, float]], list[int]]:
    """Metrics of each step, and bytes that were allocated when each generation began."""
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

    def note_and_generate(*args: Any, **kwargs: Any) -> Any:
        allocated.append(torch.cuda.memory_allocated() - before)
        return generate(*args, **kwargs)

    job.generation.generate = note_and_generate  # type: ignore[method-assign]
    assert job.run() == f"all {STEPS} steps are done"
    recorder: Any = job.recorder
    return recorder.of_step, allocated


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_steps_train_and_both_sides_compute_one_model(
    model: tuple[Path, int], precision: str, bound: float, sharding: str, offload: bool
) -> None:
    metrics, _ = run(model[0], precision=precision, sharding=sharding, offload=offload)
    assert len(metrics) == STEPS
    for step in metrics:
        assert all(math.isfinite(value) for value in step.values())
        assert step["train/logprob_error"] < bound
        assert step["train/grad_norm"] > 0


def test_generation_has_the_memory_of_a_policy_that_leaves(model: tuple[Path, int]) -> None:
    directory, num_parameters = model
    _, stays = run(directory, offload=False)
    gc.unfreeze()
    gc.collect()
    _, leaves = run(directory, offload=True)
    # From the second step on: weights, two moments, and the reference policy's weights.
    assert stays[-1] - leaves[-1] > 0.9 * 16 * num_parameters
