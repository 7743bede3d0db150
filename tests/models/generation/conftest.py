"""Tiny models of several families, with a character tokenizer, saved as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_generation import CONFIGS, TinyModel
from transformers import AutoModelForCausalLM

from nemo_rl.models.embedded import make_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a function: name in CONFIGS and changed settings -> TinyModel (each is made once)."""
    models: dict[tuple, TinyModel] = {}

    def get(name: str, **changes) -> TinyModel:
        key = (name, *changes.items())
        if key not in models:
            directory: Path = tmp_path_factory.mktemp(name)
            tokenizer = make_tokenizer()
            tokenizer.save_pretrained(directory)
            torch.manual_seed(0)
            config = CONFIGS[name](len(tokenizer))
            config.update(changes)
            model = AutoModelForCausalLM.from_config(config).eval()
            for parameter in model.parameters():
                if parameter.ndim == 1:  # at their initial values, 0 and 1, a missing bias or norm would not show
                    torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
            model.config.architectures = [type(model).__name__]  # as `model.save_pretrained` writes it
            model.config.save_pretrained(directory)
            models[key] = TinyModel(directory, model, tokenizer)
        return models[key]

    return get
