"""Llama 2 and 3."""

from __future__ import annotations

from transformers import PreTrainedConfig

from nemo_rl.models.policy.megatron.families.family import DENSE_LAYER, DENSE_MODEL, Family


def _problem(config: PreTrainedConfig) -> str | None:
    if config.attention_bias or config.mlp_bias:
        return "its projections have biases (attention_bias, mlp_bias)"
    return None


FAMILY = Family(layer=DENSE_LAYER, model=DENSE_MODEL, problem=_problem)
