"""The description of a model family: tables from Megatron's to Hugging Face's parameter names, and settings.

What a Hugging Face configuration says in the same words for all families is read from it, not from the tables: sizes,
biases, the activation, windows (`layer_types`, `sliding_window`) and rotary frequencies (`rope_parameters`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
# Their frequencies depend on the configuration only and their output is not scaled.
_ROPE_TYPES = ("default", "linear", "llama3")
# Activations of gated MLPs, by Hugging Face's names.
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def activation_name(config: PreTrainedConfig) -> str:
    """Return Hugging Face's name of the MLP's activation."""
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Return for each layer how it attends: `FULL_ATTENTION`, `SLIDING_ATTENTION`, or a kind that is not supported."""
    types: list[str] | None = getattr(config, "layer_types", None)
    return types or [FULL_ATTENTION] * config.num_hidden_layers


def rope_parameters(config: PreTrainedConfig) -> dict[str, Mapping[str, Any]]:
    """Return the parameters of the rotary embedding by type of layer; one entry if all layers share them."""
    parameters: Mapping[str, Any] = config.rope_parameters or {}
    types = (FULL_ATTENTION, SLIDING_ATTENTION)
    by_type = {kind: parameters[kind] for kind in types if isinstance(parameters.get(kind), Mapping)}
    return by_type or {FULL_ATTENTION: parameters}


def unsupported_feature(config: PreTrainedConfig) -> str | None:
    """Return what no family of this backend supports; None if there is no such thing."""
    activation = activation_name(config)
    if activation not in ACTIVATIONS:
        return f"its activation is {activation!r}; supported: {', '.join(ACTIVATIONS)}"
    for kind in layer_types(config):
        if kind not in (FULL_ATTENTION, SLIDING_ATTENTION):
            return f"it has layers of the type {kind!r}; supported: {FULL_ATTENTION}, {SLIDING_ATTENTION}"
    for parameters in rope_parameters(config).values():
        rope = parameters.get("rope_type", "default")
        if rope not in _ROPE_TYPES:
            return f"its rotary embedding has the type {rope!r}; supported: {', '.join(_ROPE_TYPES)}"
    return None


def projection_biases(config: PreTrainedConfig) -> str | None:
    """Return the problem of a model whose projections have biases, for families without them."""
    return "its projections have biases (attention_bias)" if config.attention_bias else None


def _no_settings(config: PreTrainedConfig) -> Mapping[str, Any]:
    return {}


def _no_problem(config: PreTrainedConfig) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """Describes a family of decoders.

    Attributes:
        layer: rules for one layer's parameters, by Megatron's names below `decoder.layers.<i>.`. Hugging Face's names
            are below `model.layers.<i>.`.
        model: rules for all other parameters, by full names.
        transformer: returns settings of `megatron.core.transformer.TransformerConfig` besides those that all families
            share.
        has_experts: every layer has a router and experts instead of an MLP; `moe` adds their settings.
        problem: returns why this backend cannot train a model of the family; None if it can.
        output_norms: whether the outputs of attention and MLP are normalized before they are added to their inputs.
        embedding_scale: returns the factor of the embedded tokens; None: no factor.
    """

    layer: Mapping[str, Rule]
    model: Mapping[str, Rule]
    transformer: Callable[[PreTrainedConfig], Mapping[str, Any]] = _no_settings
    has_experts: bool = False
    problem: Callable[[PreTrainedConfig], str | None] = _no_problem
    output_norms: bool = False
    embedding_scale: Callable[[PreTrainedConfig], float] | None = None


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
OUTPUT_NORMS: Mapping[str, Rule] = {
    "self_attention.linear_proj.post_layernorm.weight": Replicated("post_attention_layernorm.weight"),
    "pre_mlp_layernorm.weight": Replicated("pre_feedforward_layernorm.weight"),
    "mlp.linear_fc2.post_layernorm.weight": Replicated("post_feedforward_layernorm.weight"),
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
