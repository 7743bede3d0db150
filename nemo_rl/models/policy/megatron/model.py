"""Builds this rank's part of megatron-core's GPT model for a Hugging Face configuration."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.megatron.attention import (
    CausalAttention,
    NormedRowParallelLinear,
    PackedSequences,
    RmsNorm,
    TwoRopesSelfAttention,
)
from nemo_rl.models.policy.megatron.config import MegatronOptions
from nemo_rl.models.policy.megatron.families.family import (
    ACTIVATIONS,
    SLIDING_ATTENTION,
    Family,
    activation_name,
    layer_types,
    rope_parameters,
)
from nemo_rl.models.policy.megatron.moe import moe_settings, moe_spec
from nemo_rl.models.policy.megatron.parallel import Grid
from nemo_rl.models.policy.megatron.sharding_rules import padded_vocabulary


class PolicyModel(GPTModel):
    """A GPT model that scales its embeddings and computes logits only for selected positions."""

    _columns: slice | torch.Tensor | None = None
    embedding_scale: torch.Tensor | None = None

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        *,
        packed: PackedSequences | None = None,
        columns: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map [R, C] tokens to logits [R, K, V / tensor-parallel size] (last stage) or to the next stage's input.

        `columns` are the K positions whose logits are needed; None: all C.
        """
        self._columns = columns
        embedded = None
        if self.pre_process and self.embedding_scale is not None:
            embedded = self.embedding(input_ids=input_ids, position_ids=None) * self.embedding_scale
        output: torch.Tensor = super().forward(
            input_ids, position_ids=None, attention_mask=None, decoder_input=embedded, packed_seq_params=packed
        )
        return output

    def _postprocess(self, hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
        if self.post_process and self._columns is not None:
            hidden_states = hidden_states[self._columns]
        output: torch.Tensor = super()._postprocess(hidden_states=hidden_states, **rest)
        return output


def build_model(
    hf: PreTrainedConfig, family: Family, policy: PolicyConfig, options: MegatronOptions, grid: Grid, *, trained: bool
) -> PolicyModel:
    """Build this rank's part of a model that `check_model` accepts. Its weights are allocated but not initialized."""
    config = _transformer_config(hf, family, policy, options, grid.world.device, trained=trained)
    model = PolicyModel(
        config,
        _layers(config, family, num_ropes=len(rope_parameters(hf))),
        vocab_size=padded_vocabulary(hf.vocab_size, options.tensor_parallel_size),
        max_sequence_length=policy.max_sequence_length,
        pre_process=grid.stage == 0,
        post_process=grid.is_last_stage,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
    )
    model.rotary_pos_emb.inv_freq = _rotary_frequencies(hf).to(grid.world.device)
    if family.embedding_scale is not None:
        # As in transformers, the factor has the precision of the embeddings.
        scale = torch.tensor(family.embedding_scale(hf), dtype=config.params_dtype, device=grid.world.device)
        model.embedding_scale = scale
    model.to(device=grid.world.device, dtype=config.params_dtype)
    model.requires_grad_(trained)
    model.train(trained)
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return model


def wrap_for_training(model: PolicyModel, options: MegatronOptions) -> DistributedDataParallel:
    """Wrap a model in megatron-core's data parallelism. Gradients are summed over ranks, never averaged."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.grad_reduce_in_fp32,
        use_distributed_optimizer=options.distributed_optimizer,
        overlap_grad_reduce=False,
    )
    wrapped = DistributedDataParallel(model.config, config, model)
    model.config.finalize_model_grads_func = _finalize
    return wrapped


def _finalize(model: list[Any], num_tokens: Any, **options: Any) -> None:
    """Reduce gradients over ranks without dividing by the number of tokens, because the loss has divided by it."""
    finalize_model_grads(model, None, **options)


def _transformer_config(
    hf: PreTrainedConfig,
    family: Family,
    policy: PolicyConfig,
    options: MegatronOptions,
    device: torch.device,
    *,
    trained: bool,
) -> TransformerConfig:
    dtype = torch.bfloat16 if policy.precision == "bfloat16" else torch.float32
    recompute: dict[str, Any] = {}
    if trained and policy.activation_checkpointing:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": options.recompute_num_layers,
        }
    windows = [int(kind == SLIDING_ATTENTION) for kind in layer_types(hf)]
    window: dict[str, Any] = {}
    if any(windows):
        window = {"window_size": (hf.sliding_window - 1, 0), "window_attn_skip_freq": windows}
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[activation_name(hf)],
        add_bias_linear=False,
        # Dropout is off: the policy that is trained must be the policy that sampled.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=options.tensor_parallel_size,
        pipeline_model_parallel_size=options.pipeline_parallel_size,
        context_parallel_size=options.context_parallel_size,
        sequence_parallel=options.sequence_parallel,
        # Micro-batches differ in shape, so stages communicate their shapes.
        variable_seq_lengths=options.pipeline_parallel_size > 1,
        # The default does not allow variable lengths, even for a model without experts.
        moe_token_dispatcher_type="alltoall",
        # Losses divide by global counts, so the schedule must divide neither by micro-batches nor by ranks.
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        # Fused kernels need Transformer Engine, Apex or a compiler on the node.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **family.transformer(hf),
        **window,
        **(moe_settings(hf, options) if family.has_experts else {}),
        **recompute,
    )


def _rotary_frequencies(hf: PreTrainedConfig) -> torch.Tensor:
    """Return the frequencies [width / 2]; if types of layers differ, those of all types one after the other."""
    frequencies = []
    for parameters in rope_parameters(hf).values():
        config: Any = copy.copy(hf)
        config.rope_parameters = dict(parameters)
        # It reads attributes that all families have.
        frequencies.append(LlamaRotaryEmbedding(config).inv_freq.detach())
    return torch.cat(frequencies)


def _layers(config: TransformerConfig, family: Family, num_ropes: int) -> TransformerBlockSubmodules:
    """Return the specification of megatron-core's layers with the norms and the attention of `attention`."""
    row_parallel = NormedRowParallelLinear if family.output_norms else RowParallelLinear
    head_norm = RmsNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention if num_ropes == 1 else TwoRopesSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CausalAttention,
            linear_proj=row_parallel,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=row_parallel))
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RmsNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RmsNorm,
            mlp=moe_spec() if config.num_moe_experts else mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RmsNorm)
