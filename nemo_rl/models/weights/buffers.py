"""A pool of buffers. New host memory costs a page fault per 4 KiB, so buffers are reused once they are unreferenced."""

from __future__ import annotations

import weakref

import torch

_GRANULE = 4 << 20  # sizes are rounded up, so that buffers of similar sizes are interchangeable


class ReusedBuffers:
    """Lends memory for a few buckets at a time.

    Example:
        The second buffer reuses the memory of the first::

            buffers = ReusedBuffers()
            lent = buffers.lend(1000)
            del lent
            lent = buffers.lend(1000)

    Args:
        device: device of the memory.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._free: list[torch.Tensor] = []

    def lend(self, num_bytes: int) -> torch.Tensor:
        """Return [num_bytes] uint8 with arbitrary values. The loan ends with this tensor; views do not extend it."""
        fitting = [buffer for buffer in self._free if buffer.numel() >= num_bytes]
        if fitting:
            buffer = min(fitting, key=torch.Tensor.numel)
            self._free = [other for other in self._free if other is not buffer]
        else:
            if self._free:
                self._free.pop()  # too small; the new buffer replaces it
            size = max(-(-num_bytes // _GRANULE), 1) * _GRANULE
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        lent = buffer[:num_bytes]
        weakref.finalize(lent, _give_back, weakref.ref(self), buffer)
        return lent

    def clear(self) -> None:
        """Free all memory that is not lent."""
        self._free.clear()


def _give_back(owner: weakref.ref[ReusedBuffers], buffer: torch.Tensor) -> None:
    buffers = owner()
    if buffers is not None:
        buffers._free.append(buffer)
