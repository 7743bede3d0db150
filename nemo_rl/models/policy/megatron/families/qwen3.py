"""Qwen 3, dense: queries and keys are normalized per head."""

from __future__ import annotations

from nemo_rl.models.policy.megatron.families.family import (
    ATTENTION_NORMS,
    DENSE_LAYER,
    DENSE_MODEL,
    Family,
    projection_biases,
)

FAMILY = Family(
    layer={**DENSE_LAYER, **ATTENTION_NORMS},
    model=DENSE_MODEL,
    transformer=lambda config: {"qk_layernorm": True},
    problem=projection_biases,
)
