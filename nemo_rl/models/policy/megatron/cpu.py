"""Patches that let megatron-core, which is written for CUDA, run on a CPU.

They apply to the worker's process only, and only if the worker computes on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import utils
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

_CPU = torch.device("cpu")


class _TorchWithoutCuda:
    """Replaces the module `torch` in code that passes `device="cuda"`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device=_CPU, **options)

    @staticmethod
    def tensor(data: Any, *, device: Any = None, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.tensor(data, device=_CPU, **options)


@functools.cache
def adapt_to_cpu() -> None:
    """Patch torch and megatron-core so that they use the CPU instead of a GPU, until the process ends."""
    # Buffers and parameters are created on the "current device".
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # megatron-core synchronizes the GPU after point-to-point messages. Waiting for gloo messages is enough.
    torch.cuda.synchronize = lambda device=None: None
    # Before it reduces gradients, the current stream would wait for CUDA graphs, of which there are none.
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,return-value]
    # Tied embeddings and index tensors are moved to the GPU.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    # Optimizers distinguish precisions by type names such as "torch.cuda.FloatTensor".
    torch.Tensor.type = _type_as_if_on_cuda(torch.Tensor.type)  # type: ignore[method-assign]
    # These modules create small tensors with device="cuda", or in pinned memory.
    for module in (schedules, clip_grads, optimizer, rope_utils, utils):
        module.torch = _TorchWithoutCuda()
    # Recomputation saves and restores the GPU's random state, but the model draws no random numbers.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0)
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    # The dispatcher of tokens copies the numbers of tokens to the host on a stream of its own.
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _CPU
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _splits_as_lists


def _splits_as_lists(dispatcher: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> Any:
    """Replace the dispatcher's copy to the host: split sizes must be numbers, and they are on the host already."""
    for name in ("input_splits", "output_splits", "output_splits_tp"):
        sizes = getattr(dispatcher, name)
        if isinstance(sizes, torch.Tensor):
            setattr(dispatcher, name, sizes.tolist())
    return tokens_per_expert


def _type_as_if_on_cuda(plain: Any) -> Any:
    @functools.wraps(plain)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return type_name
