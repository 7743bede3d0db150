"""Validates the configurations in examples/configs and the commands in their headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.jobs.job_config import load_job_config
from nemo_rl.utils.config import load_config

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
ON_ONE_GPU = re.compile(r"On one GPU: add ((?:\S+=\S+\s*)+)")


def header(config: Path) -> str:
    lines = config.read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


@pytest.mark.parametrize(
    "config",
    sorted(
        path
        for algorithm in ("grpo", "sft", "dpo", "reward_model", "distillation")
        for path in CONFIGS.glob(f"{algorithm}_*.yaml")
    ),
    ids=lambda path: path.stem,
)
def test_configuration_and_its_overrides_are_valid(config: Path) -> None:
    job = load_job_config(config)
    assert any(config.stem.startswith(f"{section}_") for section in type(job).model_fields)
    for overrides in ON_ONE_GPU.findall(header(config)):
        assert load_job_config(config, overrides.split()).cluster.gpus_per_node == 1


@pytest.mark.parametrize(
    "name", ["grpo_math_1B", "grpo_math_1B_megatron", "grpo_math_8B_megatron", "grpo_math_async_1B"]
)
def test_large_models_use_vllm(name: str) -> None:
    """The torch backend reserves memory for the longest completion of every row: 90 GB for the 8B model."""
    generation = load_config(MasterConfig, CONFIGS / f"{name}.yaml", []).policy.generation
    assert generation.backend == "vllm"
