"""Filters warnings that a user cannot act on out of the workers' log. Import this before megatron-core.

megatron-core warns about optional packages that the `mcore` venv does not have, about calls that the venv's torch has
deprecated, and (from 0.19 on) about its own classes for which it has replacements. All are known and tested; other
warnings are shown.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

_EXPECTED = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    # The default of an option for CUDA graphs, which are not used.
    r"full scope is deprecated",
    # The distributed optimizer keeps its gradients on views of the weights.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # megatron-core frees and reallocates its gradient buffers through it.
    r"TypedStorage is deprecated",
    r"MimoModelConfig is experimental",
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
)

for _message in _EXPECTED:
    warnings.filterwarnings("ignore", message=rf"\s*{_message}")

# Logger: start of the message.
_EXPECTED_LOGS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}


def _is_not(start: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(start)


for _logger, _start in _EXPECTED_LOGS.items():
    logging.getLogger(_logger).addFilter(_is_not(_start))
