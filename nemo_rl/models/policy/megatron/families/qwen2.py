"""Qwen 2 and 2.5: biases on queries, keys and values."""

from __future__ import annotations

from nemo_rl.models.policy.megatron.families.family import ATTENTION_BIAS, DENSE_LAYER, DENSE_MODEL, Family

FAMILY = Family(
    layer={**DENSE_LAYER, **ATTENTION_BIAS}, model=DENSE_MODEL, transformer=lambda config: {"add_qkv_bias": True}
)
