"""Reads a model's tokenizer, context length and size in the driver, before any worker starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.models.policy.config import EMBEDDED_MODEL, PolicyConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelFiles:
    """Describes the model that the workers load.

    Attributes:
        name: directory or hub name.
        tokenizer: tokenizer of the model, or of `policy.tokenizer_name`.
        pad_token_id: the padding token; end-of-sequence if the tokenizer has no padding token.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int


def check_model_name(config: PolicyConfig) -> None:
    """Raise `ConfigError` if the model or tokenizer is a path that does not exist. Imports nothing."""
    check_model_path(config.model_name, "policy.model_name")
    if config.tokenizer_name is not None:
        check_model_path(config.tokenizer_name, "policy.tokenizer_name", is_model=False)


def check_model_path(name: str, key: str, *, is_model: bool = True) -> None:
    """Raise `ConfigError`, which names the configuration `key`, if `name` looks like a path but does not exist."""
    if name == EMBEDDED_MODEL:
        return
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ConfigError(f"{key}: there is no directory {name}; give a Hugging Face directory or hub name")
    if path.is_dir() and is_model and not (path / "config.json").is_file():
        raise ConfigError(f"{key}: {name} has no config.json, so it is not a Hugging Face model directory")


def prepare_model(config: PolicyConfig) -> ModelFiles:
    """Check that the model fits the configuration, create the embedded model if needed, and load the tokenizer.

    Raises:
        ConfigError: the model or tokenizer cannot be loaded, there is no padding token, or the model does not fit.
    """
    check_model_fits(config, load_architecture(config))
    # The import takes two seconds, so it follows the checks.
    from transformers import AutoTokenizer

    name = config.model_name
    if name == EMBEDDED_MODEL:
        from nemo_rl.models.embedded import ensure_embedded_model

        name = str(ensure_embedded_model(config.embedded))
    source = config.tokenizer_name or name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load("tokenizer", source, error)) from error
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ConfigError(f"the tokenizer of {source} has neither a padding nor an end-of-sequence token")
    return ModelFiles(name, tokenizer, int(pad))


def load_architecture(config: PolicyConfig, local_only: bool = False) -> PretrainedConfig:
    """Load the model's `config.json`. The embedded model need not exist. Raises the errors of `load_model_config`."""
    if config.model_name != EMBEDDED_MODEL:
        return load_model_config(config.model_name, local_only)
    from nemo_rl.models.embedded import architecture, make_tokenizer

    return architecture(config.embedded, make_tokenizer())


def check_model_fits(config: PolicyConfig, model: PretrainedConfig) -> None:
    """Raise `ConfigError` if the model's context or vocabulary is too small, or a backend cannot shard it."""
    context = getattr(model, "max_position_embeddings", None)
    if context is not None and config.max_sequence_length > context:
        raise ConfigError(
            f"policy.max_sequence_length={config.max_sequence_length} exceeds the context of {config.model_name}, "
            f"{context} tokens"
        )
    size = getattr(model, "vocab_size", None)
    if size is not None and (beyond := [token for token in config.generation.stop_token_ids if token >= size]):
        raise ConfigError(
            f"policy.generation.stop_token_ids: {config.model_name} has no token {beyond[0]}; the last is {size - 1}"
        )
    try:
        config.options.check_model(model, config)
        config.generation.options.check_model(model, config.model_name, config.generation)
    except ModelError as error:
        raise ConfigError(str(error)) from error


def load_model_config(name: str, local_only: bool = False) -> PretrainedConfig:
    """Load the model's `config.json`, with `local_only` without the network. Raises `ConfigError` on failure."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=local_only)
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load("model", name, error)) from error


def count_parameters(model_config: PretrainedConfig) -> int:
    """Count the parameters without allocating them. Tied parameters count once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_in_name(name: str) -> int | None:
    """Parse the size in a model's name; return None if it has no size.

    Example:
        >>> parameters_in_name("Qwen2.5-1.5B-Instruct")
        1500000000
    """
    sizes: list[Any] = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z])", name.replace("_", "-"))
    if not sizes:
        return None
    number, unit = sizes[-1]
    return int(float(number) * (1e9 if unit in "bB" else 1e6))


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the {what} {name} cannot be loaded: {reason}. Check the name, the network and HF_TOKEN, "
        "or download it and set policy.model_name to its directory"
    )
