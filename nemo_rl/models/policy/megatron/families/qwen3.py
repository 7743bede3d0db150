"""Qwen 3, dense: queries and keys are normalized per head."""

from __future__ import annotations

from transformers import PreTrainedConfig

from nemo_rl.models.policy.megatron.families.family import ATTENTION_NORMS, DENSE_LAYER, DENSE_MODEL, Family


def _problem(config: PreTrainedConfig) -> str | None:
    return "its projections have biases (attention_bias)" if config.attention_bias else None


FAMILY = Family(
    layer={**DENSE_LAYER, **ATTENTION_NORMS},
    model=DENSE_MODEL,
    transformer=lambda config: {"qk_layernorm": True},
    problem=_problem,
)
