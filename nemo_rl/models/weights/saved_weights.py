"""Reads the weights of a saved model in the names and the order in which a policy publishes them.

A directory whose safetensors files hold the parameters under these names is read tensor by tensor, as every checkpoint
of this project is. All other models (other names, `pytorch_model.bin`, a hub name) are loaded by transformers, which
renames tensors and needs memory for the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_rl.errors import ModelError
from nemo_rl.utils.names import abbreviated

_FILE = "model.safetensors"
Shapes = Mapping[str, Sequence[int]]


def check_saved_weights(name: str, shapes: Shapes) -> None:
    """Raise `ModelError` if the safetensors files of a directory hold parameters of another shape. Reads no weights.

    Args:
        name: directory or hub name; a hub name is not checked.
        shapes: shape of every parameter by its name, tied parameters once.
    """
    with ExitStack() as stack:
        files = _open_files(Path(name), stack)
        for parameter in [parameter for parameter in shapes if parameter in files]:
            shape = files[parameter].get_slice(parameter).get_shape()
            if shape != list(shapes[parameter]):
                raise ModelError(
                    f"the weights of {name} are of another model: {parameter} has the shape {shape}, and "
                    f"{list(shapes[parameter])} by its config.json"
                )


def saved_weights(name: str, shapes: Shapes) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors on the CPU, in the order of `shapes`; see `check_saved_weights` for the arguments.

    Raises:
        ModelError: a file is damaged, or parameters are missing.
    """
    with ExitStack() as stack:
        files = _open_files(Path(name), stack)
        if shapes.keys() <= files.keys():
            for parameter in shapes:
                yield parameter, files[parameter].get_tensor(parameter)
            return
    yield from _loaded_by_transformers(name)


def _open_files(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Return the open file of each tensor; empty without safetensors files."""
    index, single = directory / f"{_FILE}.index.json", directory / _FILE
    try:
        if single.exists():
            opened = stack.enter_context(safe_open(single, framework="pt"))
            return dict.fromkeys(opened.keys(), opened)
        if not index.exists():
            return {}
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: stack.enter_context(safe_open(directory / file, framework="pt")) for file in {*names.values()}}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the weights of {directory} cannot be read ({error}); download or write them again"
        ) from error
    return {name: files[file] for name, file in names.items()}


def _loaded_by_transformers(name: str) -> Iterator[tuple[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the weights of {name} cannot be loaded: {error}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers gives them random values
        raise ModelError(f"the weights of {name} are of another model: they lack {abbreviated(missing)}")
    yield from ((parameter, tensor.detach()) for parameter, tensor in model.named_parameters())
