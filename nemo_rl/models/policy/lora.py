"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1), with `peft`.

The weights of the model are frozen. Chosen linear layers compute W x + (alpha / rank) B A x, where A [rank, in] and
B [out, rank] are trained. B begins at 0, so training begins with the model as it is.

Generation computes with the merged weights W + (alpha / rank) B A, which are plain matrices for every engine. Usually
only A and B are sent, and merged there (see `nemo_rl.models.weights.adapters`).
"""

from __future__ import annotations

import difflib
from collections import Counter
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
    """Raise `ModelError` unless all layers in `config.target_modules` can have adapters.

    The model may be on the meta device.
    """
    has_experts = bool(getattr(module.config, "num_experts", 0))
    if config.target_modules == "all-linear" and not has_experts:
        return
    names = {
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) or type(part).__name__ == _TRANSPOSED
    }
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    known = sorted({name.rpartition(".")[2] for name in names})
    if config.target_modules == "all-linear":
        raise ModelError(
            f"policy.lora.target_modules=all-linear would include the experts of {type(module).__name__}, which are "
            f"not supported: name layers, of {', '.join(known)}"
        )
    for target in config.target_modules:
        matching = {name for name in names if name == target or name.endswith(f".{target}")}
        if tied := [name for name in sorted(matching) if uses[id(module.get_parameter(f"{name}.weight"))] > 1]:
            raise ModelError(
                f"policy.lora.target_modules: {tied[0]} of {type(module).__name__} shares its weight with another "
                f"layer (tie_word_embeddings), so an adapter of it cannot be merged; remove {target!r}"
            )
        if not matching:
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
