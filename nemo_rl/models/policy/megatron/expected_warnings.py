"""Keeps warnings that a user can do nothing about out of the workers' log. Imported before megatron-core.

megatron-core warns while it is imported of packages that it can use and the `mcore` venv does not have, and calls what
the venv's torch has renamed. What it warns of is known and tested here; all other warnings are shown.
"""

from __future__ import annotations

import warnings

_EXPECTED = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    # Of the default of an option for CUDA graphs, which are not used.
    r"full scope is deprecated",
    # The distributed optimizer keeps its gradients on views of the weights.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # It frees and takes again its buffers of gradients that way.
    r"TypedStorage is deprecated",
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
)

for _message in _EXPECTED:
    warnings.filterwarnings("ignore", message=rf"\s*{_message}")
