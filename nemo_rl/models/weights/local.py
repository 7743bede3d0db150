"""Weight buckets within one process."""

from __future__ import annotations

from typing import Any

import torch

from nemo_rl.models.weights.transport import WeightTransport


class LocalTransport(WeightTransport):
    """Passes buffers within one process: the handle is the buffer."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def put(self, buffer: torch.Tensor) -> Any:
        return buffer

    def get(self, handle: Any) -> torch.Tensor:
        buffer: torch.Tensor = handle
        return buffer
