"""Model families that the Megatron backend supports: one module per Hugging Face `model_type`.

A new family is one module in this package that defines `FAMILY`; it needs no registration.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from nemo_rl.errors import ModelError

if TYPE_CHECKING:
    from nemo_rl.models.policy.megatron.families.family import Family


def find_family(model_type: str) -> Family:
    """Return the family of a Hugging Face `model_type`. Raises `ModelError` if it is not supported."""
    known = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "family")
    if model_type not in known:
        raise ModelError(
            f"policy.backend=megatron does not support the model family {model_type!r}; supported: "
            f"{', '.join(known)}. Set policy.backend=torch, or add a file to nemo_rl/models/policy/megatron/families"
        )
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family
