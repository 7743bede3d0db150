"""Mixture-of-experts layers: megatron-core's router and token dispatcher with experts in two stacked matrices.

::

    tokens ─► router ─► all-to-all over expert-parallel ranks ─► experts of this rank ─► all-to-all ─► weighted sum

Expert-parallel ranks are data-parallel ranks for all other parameters: each has samples of its own, and the gradients
of an expert are summed over the ranks that hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformers import PreTrainedConfig

from nemo_rl.models.policy.megatron.config import MegatronOptions
from nemo_rl.models.routed_experts import replaced


class Replay:
    """Replaces the experts that a router chooses; has the interface of megatron-core's `RouterReplay`.

    Attributes:
        chosen: [tokens, K], -1 for the router's own choice, until the next forward pass. None: the router chooses.
    """

    chosen: torch.Tensor | None = None

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any, compute_topk: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores [tokens, K] of the experts, and the experts."""
        values, experts = compute_topk(scores, topk, num_groups, group_topk)
        if self.chosen is None:
            return values, experts
        experts = replaced(experts, self.chosen)
        return scores.gather(1, experts), experts


class Router(TopKRouter):
    """Chooses experts by float32 logits, unless they are given.

    Without Transformer Engine, megatron-core cannot compute the logits.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **options: Any
    ) -> None:
        super().__init__(config, pg_collection, **options)
        self.router_replay = Replay()

    def use(self, experts: torch.Tensor | None) -> None:
        """Set the experts of the next forward pass: [tokens, L * K] of all layers (see `models.routed_experts`)."""
        first = (self.layer_number - 1) * self.topk
        self.router_replay.chosen = None if experts is None else experts[:, first : first + self.topk]

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Map [s, b, hidden] to logits [s, b, experts]."""
        return F.linear(input.float(), self.weight.float())


class Experts(MegatronModule):
    """Computes this rank's experts, which are gated MLPs, with two matrix products per expert.

    megatron-core's `SequentialMLP` has two parameters per expert. These are the two that Hugging Face's models have,
    [experts, 2 * width, hidden] and [experts, hidden, width], so a rank holds a slice of each.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config)
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": device}
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * width, hidden, **options))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, hidden, width, **options))
        for parameter in self.parameters():
            # megatron-core reduces such gradients over the ranks that hold the same experts.
            parameter.allreduce = False

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Return the experts' weighted outputs [n, hidden], and no bias.

        Args:
            tokens: [n, hidden], sorted by expert.
            tokens_per_expert: [local experts] int64; their sum is n.
            weights: [n], the router's weight of each token's expert.
        """
        parts = tokens.split(tokens_per_expert.tolist())
        # `unbind` has one gradient for all experts, whereas each index would have one of the parameter's size.
        matrices = zip(self.gate_up_proj.unbind(), self.down_proj.unbind())
        outputs = [self._expert(part, *pair) for part, pair in zip(parts, matrices, strict=True)]
        return (torch.cat(outputs) * weights[:, None]).to(tokens.dtype), None

    def _expert(self, tokens: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(tokens, gate_up).chunk(2, dim=-1)
        return F.linear(self.config.activation_func(gate) * up, down)


def moe_spec() -> ModuleSpec:
    """Return the specification of a mixture-of-experts layer."""
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(router=Router, experts=Experts))


def moe_settings(hf: PreTrainedConfig, options: MegatronOptions) -> dict[str, Any]:
    """Return the settings of `TransformerConfig` for a model whose layers all have experts."""
    return {
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_router_topk": hf.num_experts_per_tok,
        # A softmax over the chosen experts equals one over all experts that is normalized over the chosen ones.
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": options.expert_parallel_size,
        # Experts are never split. Tensor-parallel ranks hold different experts, or the same for different tokens.
        "expert_tensor_parallel_size": 1,
    }
