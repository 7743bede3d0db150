"""Filters warnings that a user cannot act on out of the workers' log. Import this before megatron-core.

While megatron-core is imported, it warns about optional packages that the `mcore` venv does not have, and about calls
that the venv's torch has deprecated. Both are known and tested; all other warnings are shown.
"""

from __future__ import annotations

import warnings

_EXPECTED = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    # The default of an option for CUDA graphs, which are not used.
    r"full scope is deprecated",
    # The distributed optimizer keeps its gradients on views of the weights.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # megatron-core frees and reallocates its gradient buffers through it.
    r"TypedStorage is deprecated",
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
)

for _message in _EXPECTED:
    warnings.filterwarnings("ignore", message=rf"\s*{_message}")
