"""Which Hugging Face models the Megatron backend can train: one module per model family, named by its `model_type`.

A new family is one file here that defines `FAMILY`; nothing lists it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from nemo_rl.errors import ModelError

if TYPE_CHECKING:
    from nemo_rl.models.policy.megatron.families.family import Family


def find_family(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`. Raises `ModelError` that names the known ones."""
    known = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "family")
    if model_type not in known:
        raise ModelError(
            f"policy.backend=megatron does not know the model family {model_type!r}; it knows {', '.join(known)}. "
            "Set policy.backend=torch, or add a file to nemo_rl/models/policy/megatron/families"
        )
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family
