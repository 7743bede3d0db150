"""Qwen 2 and 2.5: biases on queries, keys and values."""

from __future__ import annotations

from transformers import PreTrainedConfig

from nemo_rl.models.policy.megatron.families.family import ATTENTION_BIAS, DENSE_LAYER, DENSE_MODEL, Family


def _problem(config: PreTrainedConfig) -> str | None:
    return "it attends within a sliding window (use_sliding_window)" if config.use_sliding_window else None


FAMILY = Family(
    layer={**DENSE_LAYER, **ATTENTION_BIAS}, model=DENSE_MODEL, transformer={"add_qkv_bias": True}, problem=_problem
)
