"""Loads Hugging Face models and tokenizers from a directory or the hub, with errors that name the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from nemo_rl.errors import ModelError

# transformers raises these for a missing, unreachable, unsupported or damaged model.
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError, SafetensorError)


def load_config(name: str, attn_implementation: str) -> PreTrainedConfig:
    """Load the configuration of a causal language model, with dropout off.

    Dropout is off because the policy that is trained must be the policy that sampled.

    Raises:
        ModelError: the model does not exist or its configuration cannot be read.
    """
    _check_directory(name)
    try:
        config: Any = AutoConfig.from_pretrained(name, attn_implementation=attn_implementation)
    except _LOADING_ERRORS as error:
        raise ModelError(_missing(name, error)) from error
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or key.endswith(("pdrop", "_drop"))):
                setattr(part, key, 0.0)
    return config


def load_model(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Load the model with float32 weights on the CPU.

    Raises:
        ModelError: weights are missing, damaged, or do not fit the configuration.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    except _LOADING_ERRORS as error:
        raise ModelError(_missing(name, error)) from error
    return model


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the float32 model on the meta device, without memory for its weights."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. Raises `ModelError` if it cannot be loaded."""
    _check_directory(name)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except _LOADING_ERRORS as error:
        raise ModelError(
            f"the tokenizer of {name!r} cannot be loaded: {_first_line(error)}. "
            "Set policy.tokenizer_name to a directory or hub name with a tokenizer"
        ) from error
    return tokenizer


def _check_directory(name: str) -> None:
    """Check that a name that looks like a path is a directory. transformers would look for it on the hub."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelError(f"there is no model directory {name!r}: correct policy.model_name, or give a hub name")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"the directory {name!r} has no config.json: it is not a Hugging Face model")


def _missing(name: str, error: Exception) -> str:
    kind = "directory" if Path(name).is_dir() else "hub name"
    return (
        f"the model of the {kind} {name!r} cannot be loaded: {_first_line(error)}. Correct policy.model_name; "
        "for a model on the hub check the network, HF_HOME and, if it is gated, HF_TOKEN; with HF_HUB_OFFLINE=1 it "
        "must be in the cache"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no details'}".rstrip(".")
