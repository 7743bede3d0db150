"""Reads a model's configuration, tokenizer and list of weight files in the driver, before any venv is built."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.algorithms.training_loop import checkpoint_remedies
from nemo_rl.errors import CheckpointError, ConfigError, ModelError
from nemo_rl.models.policy.config import EMBEDDED_MODELS, PolicyConfig
from nemo_rl.utils import model_paths

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from nemo_rl.utils.checkpoint import Checkpoint


_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
_CHUNK_BYTES = 1 << 24
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True)
class ModelFiles:
    """Holds what the driver needs of the model.

    Attributes:
        tokenizer: tokenizer of the model, or of `policy.tokenizer_name`.
        pad_token_id: the padding token; end-of-sequence if the tokenizer has no padding token.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int


def check_model_name(config: PolicyConfig) -> None:
    """Raise `ConfigError` if the model or tokenizer is a path that does not exist. Imports nothing."""
    check_model_path(config.model_name, "policy.model_name")
    if config.tokenizer_name is not None:
        check_model_path(config.tokenizer_name, "policy.tokenizer_name", is_model=False)


def check_model_path(name: str, key: str, *, is_model: bool = True) -> None:
    """See `model_paths.check_model_path`. An embedded model need not exist."""
    if name not in EMBEDDED_MODELS:
        model_paths.check_model_path(name, key, is_model=is_model)


def check_weight_files(model: str, key: str) -> None:
    """Raise `ConfigError` if `model` is a directory and weights are missing or incomplete. Imports nothing."""
    directory = Path(model).expanduser()
    if not directory.is_dir():
        return
    for name in _WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if (directory / name).exists():
            files = [directory / name]
        elif index.exists():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{key}: {index} cannot be read ({error}); download it again") from error
            files = [directory / shard for shard in sorted(shards)]
        else:
            continue
        for file in files:
            if not file.exists():
                raise ConfigError(f"{key}: {file}, which {index.name} lists, is missing; download it")
            if file.suffix == ".safetensors" and not _is_complete(file):
                raise ConfigError(
                    f"{key}: {file} is incomplete ({file.stat().st_size} bytes); download it again (with Git, by "
                    "`git lfs pull`)"
                )
        return
    raise ConfigError(
        f"{key}: {directory} has no weights: neither {' nor '.join(_WEIGHT_FILES)}, as one file or with an index"
    )


def _is_complete(file: Path) -> bool:
    """Return whether a safetensors file has the size that its header says."""
    size = file.stat().st_size
    with file.open("rb") as content:
        header_size = int.from_bytes(content.read(8), "little")
        if not 2 <= header_size <= min(size - 8, _MAX_HEADER_BYTES):
            return False
        try:
            header = json.loads(content.read(header_size))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
    return bool(size == 8 + header_size + end)


def prepare_model(config: PolicyConfig, *, use_gpus: bool = False) -> ModelFiles:
    """Check that the model fits the configuration, and load the tokenizer. Creates nothing.

    Args:
        config: the policy's configuration.
        use_gpus: generation runs on GPUs.

    Raises:
        ConfigError: the model or tokenizer cannot be loaded, there is no padding token, or the model does not fit.
    """
    model = load_architecture(config)
    check_model_fits(config, model, use_gpus=use_gpus)
    source = config.tokenizer_name or config.model_name
    tokenizer = load_tokenizer(source)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ConfigError(f"the tokenizer of {source} has neither a padding nor an end-of-sequence token")
    size = vocabulary_size(model)
    if size is not None and pad >= size:
        raise ConfigError(
            f"the padding token of {source} is {pad}, but the last token of {config.model_name} is {size - 1}; set "
            "policy.tokenizer_name to the tokenizer of the model"
        )
    return ModelFiles(tokenizer, int(pad))


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, which may be an embedded one. Raises `ConfigError` on failure."""
    if source in EMBEDDED_MODELS:
        from nemo_rl.models.embedded import make_tokenizer

        return make_tokenizer(source)
    from transformers import AutoTokenizer  # takes two seconds

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load("tokenizer", source, error)) from error
    return tokenizer


def ensure_model(config: PolicyConfig) -> str:
    """Return the directory or hub name that the workers load. Creates an embedded model if it does not exist."""
    if config.model_name not in EMBEDDED_MODELS:
        return config.model_name
    from nemo_rl.models.embedded import ensure_embedded_model

    return str(ensure_embedded_model(config.embedded, config.model_name))


def model_digest(config: PolicyConfig) -> str:
    """Return what identifies the weights of a model: a digest of a directory's weight files, or the hub's commit.

    An embedded model is identified by its section, which decides its weights. Raises `ConfigError` if there is no such
    model.
    """
    name = config.model_name
    if name in EMBEDDED_MODELS:
        return f"{name} {config.embedded.model_dump_json()}"
    directory = Path(name).expanduser()
    if not directory.is_dir():
        return f"{name} {getattr(load_architecture(config), '_commit_hash', None)}"
    import xxhash

    digest = xxhash.xxh3_128()
    for file in sorted(path for suffix in ("safetensors", "bin") for path in directory.glob(f"*.{suffix}")):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def load_architecture(config: PolicyConfig, local_only: bool = False) -> PretrainedConfig:
    """Load the model's `config.json`. An embedded model need not exist.

    Raises:
        ConfigError: See `load_model_config`. Or a reward model cannot be made from the model.
    """
    if config.model_name not in EMBEDDED_MODELS:
        model = load_model_config(config.model_name, local_only)
    else:
        from nemo_rl.models.embedded import architecture, make_tokenizer

        model = architecture(config.embedded, make_tokenizer(config.model_name))
    return _as_reward_model(config.model_name, model) if config.is_reward_model else model


def _as_reward_model(name: str, model: PretrainedConfig) -> PretrainedConfig:
    from nemo_rl.models.policy.hf_loading import as_reward_model, is_reward_model

    if not is_reward_model(model):
        check_is_language_model(name, model)
    elif model.num_labels != 1:
        raise ConfigError(f"{name} is a classifier with {model.num_labels} labels, and a reward model has one")
    try:
        return as_reward_model(model, model.get_text_config().pad_token_id)
    except ModelError as error:
        raise ConfigError(f"policy.model_name: {error}") from error


def check_model_fits(config: PolicyConfig, model: PretrainedConfig, *, use_gpus: bool = False) -> None:
    """Check whether the policy can train the model, and generation can run it, as configured.

    Args:
        config: the policy's configuration.
        model: the configuration of the model.
        use_gpus: generation runs on GPUs.

    Raises:
        ConfigError: the model is not a causal language model, its weights are quantized, its context or vocabulary is
            too small, or a backend does not support it or cannot shard it.
    """
    name = config.model_name
    if not config.is_reward_model:
        check_is_language_model(name, model)
    if quantization := getattr(model, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"the weights of {name} are quantized ({method}), and a policy trains full weights; give the model that "
            "it was made from"
        )
    context = context_length(model)
    if context is not None and config.max_sequence_length > context:
        raise ConfigError(
            f"policy.max_sequence_length={config.max_sequence_length} exceeds the context of {name}, {context} tokens"
        )
    size = vocabulary_size(model)
    if size is not None and (beyond := [token for token in config.generation.stop_token_ids if token >= size]):
        raise ConfigError(f"policy.generation.stop_token_ids: {name} has no token {beyond[0]}; the last is {size - 1}")
    try:
        config.options.check_model(model, config)
        config.generation.options.check_model(model, config.generator_spec(name, use_gpus=use_gpus))
        if config.lora is not None:
            from nemo_rl.models.policy.hf_loading import empty_model
            from nemo_rl.models.policy.lora import check_target_modules

            check_target_modules(empty_model(model), config.lora)
    except ModelError as error:
        raise ConfigError(str(error)) from error


def check_is_language_model(name: str, model: PretrainedConfig) -> None:
    """Raise `ConfigError` unless the model predicts the next token of a text."""
    architectures = getattr(model, "architectures", None) or []
    if getattr(model, "is_encoder_decoder", False):
        problem = "it has an encoder"
    elif architectures and not any(text.endswith(_LANGUAGE_MODELS) for text in architectures):
        problem = f"it is a {architectures[0]}"
    else:
        return
    raise ConfigError(f"{name} (model type {model.model_type}) is not a causal language model: {problem}")


def context_length(model: PretrainedConfig) -> int | None:
    """Return the longest sequence of the model in tokens; None if its configuration does not say."""
    text = model.get_text_config()
    longest: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if longest is not None and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
        original = rope.get("original_max_position_embeddings") or longest
        longest = max(longest, int(original * rope.get("factor", 1.0)))
    return longest


def vocabulary_size(model: PretrainedConfig) -> int | None:
    """Return the number of tokens that the model has logits for, padding included; None if it does not say."""
    return getattr(model.get_text_config(), "vocab_size", None)


def load_model_config(name: str, local_only: bool = False) -> PretrainedConfig:
    """Load the model's `config.json`, with `local_only` without the network. Raises `ConfigError` on failure."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=local_only)
    except Exception as error:  # a model's configuration class may raise any error for a damaged file
        raise ConfigError(_cannot_load("model", name, error)) from error


def check_checkpoint_model(checkpoint: Checkpoint, config: PolicyConfig) -> None:
    """Raise `CheckpointError` if the policy in a checkpoint has other parameters than the configured model.

    The checkpoint of a back end with files of its own is not checked; the back end does that when it loads them.
    """
    from nemo_rl.models.policy.policy_checkpoint import TRAINER_FILE, read_trainer

    directory = checkpoint.path / "policy"
    if not (directory / TRAINER_FILE).exists():
        return
    with checkpoint_remedies(checkpoint):
        try:
            read_trainer(directory / TRAINER_FILE, parameter_shapes(load_architecture(config)))
        except (CheckpointError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"cannot load the checkpoint {directory}: {error}") from error


def count_parameters(model_config: PretrainedConfig) -> int:
    """Count the parameters without allocating them. Tied parameters count once."""
    return sum(math.prod(shape) for shape in parameter_shapes(model_config).values())


def parameter_shapes(model_config: PretrainedConfig) -> dict[str, list[int]]:
    """Return the shapes of the parameters without allocating them. Tied parameters appear once."""
    from nemo_rl.models.policy.hf_loading import empty_model

    model = empty_model(model_config)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    return (
        f"the {what} {name} cannot be loaded: {reason}. Check the name, the network and HF_TOKEN, "
        "or download it and name its directory instead"
    )
