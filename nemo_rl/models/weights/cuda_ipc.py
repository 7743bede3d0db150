"""Weight buckets in GPU memory, for a sender and receivers on the same GPU. Nothing is copied between processes.

torch pickles a CUDA tensor as CUDA's handle of its allocation, which the receiver opens (cudaIpcOpenMemHandle).
Opening a handle takes longer than copying a bucket, so a stream reuses a few buffers, and receivers keep each one open
until the stream ends.

Expandable segments (`PYTORCH_ALLOC_CONF=expandable_segments:True`) have no such handles, so buffers are allocated
outside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.multiprocessing  # registers how connections pickle CUDA tensors

from nemo_rl.models.weights.buffers import ReusedBuffers
from nemo_rl.models.weights.transport import WeightTransport


class CudaIpcTransport(WeightTransport):
    """Shares GPU memory between processes on the same GPU.

    Args:
        device: device of the sender's buffers.
    """

    publishes = False
    streams = True
    every_rank_sends = True
    on_gpu = True
    may_be_kept = False

    def __init__(self, device: str = "cuda") -> None:
        self._device = torch.device(device)
        self._buffers = ReusedBuffers(self._device)
        self._opened: dict[int, torch.Tensor] = {}  # a receiver's buffers, by address

    def allocate(self, num_bytes: int) -> torch.Tensor:
        with _outside_expandable_segments():
            return self._buffers.lend(num_bytes)

    def put(self, buffer: torch.Tensor) -> Any:
        self.settle()  # readers do not wait for the sender's CUDA stream
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
    """Disable expandable segments within the block, so that its allocations can be shared."""
    chosen: str = getattr(torch._C, "_accelerator_getAllocatorSettings", str)()
    options = [option.strip() for option in chosen.split(",")]  # commas within a value are restored by the join below
    others = [option for option in options if not option.startswith("expandable_segments:")]
    if len(others) == len(options):
        yield
        return
    # An option that the text does not name is reset to its default, so both calls pass all options.
    torch._C._accelerator_setAllocatorSettings(",".join([*others, "expandable_segments:False"]))
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(chosen)
