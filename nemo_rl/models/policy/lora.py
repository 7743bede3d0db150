"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1), with `peft`.

The weights of the model are frozen. Chosen linear layers compute W x + (alpha / rank) B A x, where A [rank, in] and
B [out, rank] are trained. B begins at 0, so training begins with the model as it is.

Generation is served the merged weights W + (alpha / rank) B A, so that every engine computes with plain matrices.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_rl.errors import ModelError
from nemo_rl.models.policy.config import LoraConfig

_TRANSPOSED = "Conv1D"  # GPT-2's layers


def add_adapters(module: PreTrainedModel, config: LoraConfig) -> None:
    """Add adapters to a model in place, and freeze its weights. They are equal in all processes.

    Raises:
        ModelError: The model has none of the layers in `config.target_modules`.
    """
    import peft

    check_target_modules(module, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        transposed = any(type(part).__name__ == _TRANSPOSED for part in module.modules())
        peft.inject_adapter_in_model(peft_config(config, fan_in_fan_out=transposed), module)


def check_target_modules(module: PreTrainedModel, config: LoraConfig) -> None:
    """Raise `ModelError` if a layer in `config.target_modules` does not exist. The model may be on the meta device."""
    has_experts = bool(getattr(module.config, "num_experts", 0))
    if config.target_modules == "all-linear" and not has_experts:
        return
    names = {
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) or type(part).__name__ == _TRANSPOSED
    }
    known = sorted({name.rpartition(".")[2] for name in names})
    if config.target_modules == "all-linear":
        raise ModelError(
            f"policy.lora.target_modules=all-linear would include the experts of {type(module).__name__}, which are "
            f"not supported: name layers, of {', '.join(known)}"
        )
    for target in config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ModelError(
                f"policy.lora.target_modules: {type(module).__name__} has no linear layer {target!r}.{hint} It has: "
                f"{', '.join(known)}"
            )


def peft_config(config: LoraConfig, **options: Any) -> Any:
    """Return peft's configuration, with further options of it."""
    import peft

    targets = config.target_modules
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,  # the policy that is trained must be the policy that sampled
        use_rslora=config.scale_by_sqrt_rank,
        **options,
    )
