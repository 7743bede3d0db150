"""Qwen 3, mixture of experts: the attention of Qwen 3, and a router with experts instead of every MLP."""

from __future__ import annotations

from transformers import PreTrainedConfig

from nemo_rl.models.policy.megatron.families.family import (
    ATTENTION_NORMS,
    DENSE_LAYER,
    DENSE_MODEL,
    EXPERTS,
    Family,
    projection_biases,
)


def _problem(config: PreTrainedConfig) -> str | None:
    if config.use_sliding_window:
        return "it attends within a sliding window (use_sliding_window)"
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "some of its layers have no experts (mlp_only_layers, decoder_sparse_step)"
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        return "the weight of its experts is always 1 (num_experts_per_tok=1 with norm_topk_prob)"
    return projection_biases(config)


FAMILY = Family(
    layer={
        **{name: rule for name, rule in DENSE_LAYER.items() if not name.startswith("mlp.")},
        **ATTENTION_NORMS,
        **EXPERTS,
    },
    model=DENSE_MODEL,
    transformer=lambda config: {"qk_layernorm": True},
    has_experts=True,
    problem=_problem,
)
