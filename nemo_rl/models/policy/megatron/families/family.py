"""The description of a model family: tables from Megatron's to Hugging Face's parameter names, and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from nemo_rl.models.policy.megatron.sharding_rules import (
    Replicated,
    Rule,
    SplitAttention,
    SplitColumns,
    SplitExperts,
    SplitGated,
    SplitVocabulary,
)


def _no_problem(config: PreTrainedConfig) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """Describes a family of decoders.

    Attributes:
        layer: rules for one layer's parameters, by Megatron's names below `decoder.layers.<i>.`. Hugging Face's names
            are below `model.layers.<i>.`.
        model: rules for all other parameters, by full names.
        transformer: settings of `megatron.core.transformer.TransformerConfig` besides those that all families share.
        has_experts: every layer has a router and experts instead of an MLP; `moe` adds their settings.
        problem: returns why this backend cannot train a model of the family; None if it can.
    """

    layer: Mapping[str, Rule]
    model: Mapping[str, Rule]
    transformer: Mapping[str, Any] = field(default_factory=dict)
    has_experts: bool = False
    problem: Callable[[PreTrainedConfig], str | None] = _no_problem


# Rules that most dense families share.
DENSE_LAYER: Mapping[str, Rule] = {
    "self_attention.linear_qkv.weight": SplitAttention(
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"
    ),
    "self_attention.linear_proj.weight": SplitColumns("self_attn.o_proj.weight"),
    "mlp.linear_fc1.weight": SplitGated("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": SplitColumns("mlp.down_proj.weight"),
    "input_layernorm.weight": Replicated("input_layernorm.weight"),
    "pre_mlp_layernorm.weight": Replicated("post_attention_layernorm.weight"),
}
ATTENTION_BIAS: Mapping[str, Rule] = {
    "self_attention.linear_qkv.bias": SplitAttention(
        "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"
    ),
}
ATTENTION_NORMS: Mapping[str, Rule] = {
    "self_attention.q_layernorm.weight": Replicated("self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": Replicated("self_attn.k_norm.weight"),
}
EXPERTS: Mapping[str, Rule] = {
    "mlp.router.weight": Replicated("mlp.gate.weight"),
    "mlp.experts.gate_up_proj": SplitExperts("mlp.experts.gate_up_proj"),
    "mlp.experts.down_proj": SplitExperts("mlp.experts.down_proj"),
}
DENSE_MODEL: Mapping[str, Rule] = {
    "embedding.word_embeddings.weight": SplitVocabulary("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": Replicated("model.norm.weight"),
    "output_layer.weight": SplitVocabulary("lm_head.weight"),
}
