"""Which models the Megatron backend computes and can divide. Needs no megatron-core, because the driver asks too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl.errors import ModelError
from nemo_rl.models.policy.megatron.families import find_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nemo_rl.models.policy.config import PolicyConfig
    from nemo_rl.models.policy.megatron.config import MegatronOptions

# Their frequencies follow from the configuration alone, without a factor on the result.
_ROPE_TYPES = ("default", "linear", "llama3")


def check_model(hf: PretrainedConfig, policy: PolicyConfig, options: MegatronOptions) -> None:
    """Raise `ModelError` when this backend computes another model, or cannot divide it as the options say."""
    family = find_family(hf.model_type)
    name, tensor, stages = policy.model_name, options.tensor_parallel_size, options.pipeline_parallel_size
    problem = family.problem(hf)
    if problem is None and hf.hidden_act != "silu":
        problem = f"its activation is {hf.hidden_act!r} instead of 'silu'"
    rope = (hf.rope_parameters or {}).get("rope_type", "default")
    if problem is None and rope not in _ROPE_TYPES:
        problem = f"its rotary embedding is of type {rope!r}; known: {', '.join(_ROPE_TYPES)}"
    if problem is not None:
        raise ModelError(f"policy.backend=megatron cannot train {name!r}: {problem}. Set policy.backend=torch")
    heads, groups = hf.num_attention_heads, hf.num_key_value_heads
    if heads % tensor or hf.intermediate_size % tensor or (groups % tensor and tensor % groups):
        raise ModelError(
            f"policy.options.tensor_parallel_size={tensor} must divide the {heads} attention heads and the MLP's width "
            f"{hf.intermediate_size} of {name!r}, and divide its {groups} key-value heads or be a multiple of them"
        )
    if hf.num_hidden_layers % stages:
        raise ModelError(
            f"policy.options.pipeline_parallel_size={stages} must divide the {hf.num_hidden_layers} layers of {name!r}"
        )
    if policy.max_sequence_length > hf.max_position_embeddings:
        raise ModelError(
            f"policy.max_sequence_length={policy.max_sequence_length} exceeds the {hf.max_position_embeddings} "
            f"positions of the model {name!r}"
        )
