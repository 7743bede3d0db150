"""Loads Hugging Face models and tokenizers from a directory or the hub, with errors that name the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from nemo_rl.errors import ModelError

# Name of the linear layer that computes the scores of a reward model.
SCORE_LAYER = "score"
_REWARD_ARCHITECTURE = "ForSequenceClassification"

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

    The score of a reward model that is made from a language model begins at 0, so that all processes begin alike.

    Raises:
        ModelError: weights are missing, damaged, or do not fit the configuration.
    """
    try:
        model, info = _auto_class(config).from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except _LOADING_ERRORS as error:
        raise ModelError(_missing(name, error)) from error
    if is_reward_model(config) and f"{SCORE_LAYER}.weight" in info["missing_keys"]:
        torch.nn.init.zeros_(getattr(model, SCORE_LAYER).weight)
    loaded: PreTrainedModel = model
    return loaded


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the float32 model on the meta device, without memory for its weights."""
    with torch.device("meta"):
        model: Any = _auto_class(config).from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def as_reward_model(config: PreTrainedConfig, pad_token_id: int | None) -> PreTrainedConfig:
    """Change the configuration of a language model, in place, into that of a model with one score per sequence.

    Args:
        config: of a language model, or of a reward model.
        pad_token_id: the padding token, behind which transformers looks for the last token of a sequence.

    Raises:
        ModelError: transformers has no such model of this family.
    """
    architecture = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
    if architecture is None:
        raise ModelError(f"transformers has no model of the type {config.model_type} that scores sequences")
    config.architectures = [architecture]
    config.num_labels = 1
    config.get_text_config().pad_token_id = pad_token_id
    return config


def is_reward_model(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is that of a model which scores sequences."""
    return any(name.endswith(_REWARD_ARCHITECTURE) for name in config.architectures or [])


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSequenceClassification if is_reward_model(config) else AutoModelForCausalLM


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the padding token of a tokenizer, or its end-of-sequence token if it has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


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
