"""Tests that invalid values of a GRPO configuration are refused when it is loaded."""

from __future__ import annotations

import re

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import ConfigError
from nemo_rl.utils.config import load_config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("policy.generation.temperature=0", "to validate greedily, set policy.generation.validation to null"),
        (
            "policy.generation.validation={temperature: 0}",
            "policy.generation.validation.temperature: temperature 0 is not supported",
        ),
        ("policy.generation.temperature=.inf", "policy.generation.temperature: input should be a finite number"),
        ("policy.generation.top_k=-1", "policy.generation.top_k: to draw from all tokens, set it to null"),
        ("policy.generation.top_k=0", "policy.generation.top_k: to draw from all tokens, set it to null"),
        ('policy.generation.stop_strings=[""]', "policy.generation.stop_strings: an empty stop string"),
        ("policy.generation.stop_token_ids=[-1]", "policy.generation.stop_token_ids: token ids must not be negative"),
        ("policy.generation.precision=fp8", "policy.generation.precision: input should be 'float32' or 'bfloat16'"),
        (
            "policy.optimizer.betas=[0.9, 1.0]",
            "policy.optimizer.betas: both decay rates must be at least 0 and less than 1",
        ),
        ("policy.optimizer.lr=.inf", "policy.optimizer.lr: input should be a finite number"),
        ("policy.embedded.num_attention_heads=3", r"hidden_size \(128\) must be num_attention_heads \(3\) times an"),
        ("policy.embedded.num_attention_heads=128", "times an even number"),
        ("policy.generation={top_p: 0.9} loss.importance_correction=none", r"top_p=0.9 .*loss.importance_correction"),
        ("policy.generation={top_k: 5} loss.importance_correction=sequence", r"top_k=5 .*and it is sequence"),
        ("grpo.in_flight_weight_updates=true", "needs max_trajectory_age of at least 1"),
    ],
)
def test_invalid_value_is_refused(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(MasterConfig, None, re.split(r" (?=loss\.)", override))


def test_in_flight_updates_work_with_rollouts_ahead() -> None:
    overrides = ["grpo.in_flight_weight_updates=true", "grpo.max_trajectory_age=1"]
    assert load_config(MasterConfig, None, overrides).grpo.in_flight_weight_updates


@pytest.mark.parametrize(
    "override", ["policy.generation.temperature=0.5", "policy.generation.top_p=0.9", "policy.generation.top_k=5"]
)
def test_sampling_works_with_token_weights(override: str) -> None:
    assert load_config(MasterConfig, None, [override]).loss.importance_correction == "token"


def test_sampling_of_validation_is_not_restricted() -> None:
    overrides = ["policy.generation.validation={top_p: 0.9}", "loss.importance_correction=none"]
    assert load_config(MasterConfig, None, overrides).policy.generation.validation is not None
