"""Gemma 3, text: norms with weights around 1 before and after attention and MLP, and scaled embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from nemo_rl.models.policy.megatron.families.family import (
    ATTENTION_NORMS,
    DENSE_LAYER,
    DENSE_MODEL,
    OUTPUT_NORMS,
    Family,
    projection_biases,
)


def _transformer(config: PreTrainedConfig) -> Mapping[str, Any]:
    return {
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "softmax_scale": config.query_pre_attn_scalar**-0.5,
    }


def _problem(config: PreTrainedConfig) -> str | None:
    if config.use_bidirectional_attention:
        return "its attention is not causal (use_bidirectional_attention)"
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        return "its scores or logits are capped (attn_logit_softcapping, final_logit_softcapping)"
    return projection_biases(config)


FAMILY = Family(
    layer={**DENSE_LAYER, **ATTENTION_NORMS, **OUTPUT_NORMS},
    model=DENSE_MODEL,
    transformer=_transformer,
    problem=_problem,
    output_norms=True,
    embedding_scale=lambda config: config.hidden_size**0.5,
)
