"""Buffers that are used again as soon as nobody has them: new host memory costs a page fault per 4 KiB."""

from __future__ import annotations

import weakref

import torch

_GRANULE = 4 << 20  # buffers of about the same size can take one another's place


class ReusedBuffers:
    """Memory for a few buckets at a time.

    Args:
        device: where it lies.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._free: list[torch.Tensor] = []

    def lend(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, with arbitrary values. It is lent for as long as this very tensor lives, not views."""
        fitting = [buffer for buffer in self._free if buffer.numel() >= num_bytes]
        if fitting:
            buffer = min(fitting, key=torch.Tensor.numel)
            self._free = [other for other in self._free if other is not buffer]
        else:
            if self._free:
                self._free.pop()  # too small: the new one takes its place
            size = max(-(-num_bytes // _GRANULE), 1) * _GRANULE
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        lent = buffer[:num_bytes]
        weakref.finalize(lent, _give_back, weakref.ref(self), buffer)
        return lent

    def clear(self) -> None:
        """Let go of what nobody has."""
        self._free.clear()


def _give_back(owner: weakref.ref[ReusedBuffers], buffer: torch.Tensor) -> None:
    buffers = owner()
    if buffers is not None:
        buffers._free.append(buffer)
