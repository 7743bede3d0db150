"""What the driver reads of a model before any worker starts: its tokenizer, its context length, its size."""

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
    """A model as the workers will load it.

    Attributes:
        name: directory or hub name.
        tokenizer: of the model, or of `policy.tokenizer_name`.
        pad_token_id: what fills rows; end-of-sequence for a tokenizer without padding.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int


def check_model_name(config: PolicyConfig) -> None:
    """Refuse a path that does not exist, without importing anything. Raises `ConfigError`."""
    check_model_path(config.model_name, "policy.model_name")
    if config.tokenizer_name is not None:
        check_model_path(config.tokenizer_name, "policy.tokenizer_name", is_model=False)


def check_model_path(name: str, key: str, *, is_model: bool = True) -> None:
    """Refuse a name that looks like a path where there is nothing. Raises `ConfigError` that names the `key`."""
    if name == EMBEDDED_MODEL:
        return
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ConfigError(f"{key}: there is no directory {name}; give a Hugging Face directory or hub name")
    if path.is_dir() and is_model and not (path / "config.json").is_file():
        raise ConfigError(f"{key}: {name} has no config.json, so it is not a Hugging Face model directory")


def prepare_model(config: PolicyConfig) -> ModelFiles:
    """Check that the model fits the configuration, make it if it is the embedded one, and load the tokenizer.

    Raises:
        ConfigError: the model or tokenizer cannot be loaded, has no token to pad with, or `check_model_fits`.
    """
    check_model_fits(config, load_architecture(config))
    # Two seconds to import, and a job that is refused early need not wait for them.
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
    """The model's `config.json`; that of the embedded model without making it. Raises as `load_model_config`."""
    if config.model_name != EMBEDDED_MODEL:
        return load_model_config(config.model_name, local_only)
    from nemo_rl.models.embedded import architecture, make_tokenizer

    return architecture(config.embedded, make_tokenizer())


def check_model_fits(config: PolicyConfig, model: PretrainedConfig) -> None:
    """Raise `ConfigError` when the model's context or vocabulary is too small, or a backend cannot divide it."""
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
    """The model's `config.json`; `local_only` asks no hub. Raises `ConfigError` when it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=local_only)
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load("model", name, error)) from error


def count_parameters(model_config: PretrainedConfig) -> int:
    """Number of parameters, tied ones once, without allocating them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_in_name(name: str) -> int | None:
    """The size that a model's name states ("Qwen2.5-1.5B-Instruct": 1.5e9), or None."""
    sizes: list[Any] = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z])", name.replace("_", "-"))
    if not sizes:
        return None
    number, unit = sizes[-1]
    return int(float(number) * (1e9 if unit in "bB" else 1e6))


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the {what} {name} cannot be loaded: {reason}. Check the name, the network and HF_TOKEN, "
        "or download it and give its directory in policy.model_name"
    )
