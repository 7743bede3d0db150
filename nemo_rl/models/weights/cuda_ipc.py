"""Weight buckets in a GPU's memory, for a sender and receivers that share the GPU: nothing is moved.

torch knows how to send a tensor on a GPU to another process: what is pickled is CUDA's handle of the allocation, which
the receiver opens (cudaIpcOpenMemHandle). Opening takes longer than copying a bucket does; so a stream goes through a
few buffers again and again, and receivers keep each open until the stream ends.

Expandable segments (`PYTORCH_ALLOC_CONF=expandable_segments:True`) have no such handle: buffers lie outside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.multiprocessing  # teaches the pickling of connections how to share tensors

from nemo_rl.models.weights.buffers import ReusedBuffers
from nemo_rl.models.weights.transport import WeightTransport


class CudaIpcTransport(WeightTransport):
    """The GPU's memory, for processes that use the same GPU.

    Args:
        device: of the sender's buffers.
    """

    publishes = False
    streams = True
    every_rank_sends = True
    on_gpu = True
    may_be_kept = False

    def __init__(self, device: str = "cuda") -> None:
        self._device = torch.device(device)
        self._buffers = ReusedBuffers(self._device)
        self._opened: dict[int, torch.Tensor] = {}  # by address; of receivers

    def allocate(self, num_bytes: int) -> torch.Tensor:
        with _outside_expandable_segments():
            return self._buffers.lend(num_bytes)

    def put(self, buffer: torch.Tensor) -> Any:
        self.settle()  # its readers do not wait for the sender's CUDA stream
        return buffer

    def get(self, handle: Any) -> torch.Tensor:
        buffer: torch.Tensor = handle
        self._opened[buffer.data_ptr()] = buffer
        return buffer

    def settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def release(self) -> None:
        self._buffers.clear()
        self._opened.clear()
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()


@contextlib.contextmanager
def _outside_expandable_segments() -> Iterator[None]:
    """What is allocated in the block can be shared, whatever the user has told the allocator, which knows it after."""
    chosen: str = getattr(torch._C, "_accelerator_getAllocatorSettings", str)()
    options = [option.strip() for option in chosen.split(",")]  # a list's own commas come back where they were
    others = [option for option in options if not option.startswith("expandable_segments:")]
    if len(others) == len(options):
        yield
        return
    # Options that the text lacks fall back to their defaults; so all of them are said again, both times.
    torch._C._accelerator_setAllocatorSettings(",".join([*others, "expandable_segments:False"]))
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(chosen)
