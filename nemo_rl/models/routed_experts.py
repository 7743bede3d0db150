"""The experts that the routers of a transformers model choose: recorded in generation, replayed in training.

Generation and training compute a router's logits with different kernels or precisions, so a token near a tie is sent to
another expert, and its log-probability changes by far more than a rounding error. In training, the routers therefore
take the experts of generation; their weights are still those of the model that is trained, and so are the gradients
(Ma et al. 2025, "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers",
arXiv:2510.11370).

Experts of a token are K numbers for each of L layers, layer by layer: [..., L * K] int16. In a batch, those of the last
token of a sequence are unknown: no prediction follows it. -1 stands for the router's own choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ROUTED_EXPERTS = "routed_experts"  # key of a batch
# Routers that return logits, weights and indices, and have `norm_topk_prob`. Their families are in the module
# `generation.config`, which the driver imports without torch.
_ROUTERS = ("Qwen3MoeTopKRouter",)


def find_routers(model: nn.Module) -> list[Any]:
    """Return the routers of a transformers model, layer by layer."""
    return [module for module in model.modules() if type(module).__name__ in _ROUTERS]


class ExpertRecorder:
    """Records the experts of every forward pass of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._chosen: list[torch.Tensor] = []
        for router in find_routers(model):
            router.register_forward_hook(lambda module, inputs, output: self._chosen.append(output[2]))

    def take(self) -> torch.Tensor:
        """Return the experts of the last forward pass, [tokens, L * K] int16."""
        chosen = torch.cat(self._chosen, dim=-1).to(torch.int16)
        self._chosen.clear()
        return chosen


class ExpertReplay:
    """Lets the routers of a model take given experts. Create it once per model."""

    def __init__(self, model: nn.Module) -> None:
        self._chosen: torch.Tensor | None = None
        for layer, router in enumerate(find_routers(model)):
            router.register_forward_hook(
                lambda module, inputs, output, layer=layer: self._replaced(module, output, layer)
            )

    def use(self, chosen: torch.Tensor | None) -> None:
        """Set the experts until the next call, for recomputed activations, too.

        Args:
            chosen: [tokens, L * K], see the module's docstring; None: the routers choose.
        """
        self._chosen = chosen

    def _replaced(self, router: Any, output: Any, layer: int) -> Any:
        if self._chosen is None:
            return output
        logits, weights, routed = output
        count = routed.shape[-1]
        chosen = replaced(routed, self._chosen[:, layer * count : (layer + 1) * count])
        values = logits.softmax(-1, dtype=torch.float32).gather(-1, chosen)
        if router.norm_topk_prob:
            values = values / values.sum(-1, keepdim=True)
        return logits, values.to(weights.dtype), chosen


def replaced(routed: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the chosen experts, [tokens, K] int64, or those of the router where `chosen` is -1."""
    return torch.where(chosen < 0, routed, chosen.long())


def known_experts(experts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return [b, T, L * K] experts with -1 for the last token of each sequence and for padding."""
    position = torch.arange(experts.shape[1], device=experts.device)
    return experts.masked_fill((position >= lengths[:, None] - 1)[..., None], -1)
