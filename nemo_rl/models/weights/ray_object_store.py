"""Weight buckets in Ray's object store."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.transport import WeightTransport


class RayObjectStoreTransport(WeightTransport):
    """Uses Ray's object store: on one node receivers map the memory, across nodes Ray transfers it once per node."""

    def __init__(self) -> None:
        self._staging = torch.empty(0, dtype=torch.uint8)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        if self._staging.numel() < num_bytes:
            self._staging = torch.empty(num_bytes, dtype=torch.uint8)
        return self._staging[:num_bytes]  # `put` copies it

    def put(self, buffer: torch.Tensor) -> Any:
        import ray

        return ray.put(buffer.numpy())

    def get(self, handle: Any) -> torch.Tensor:
        import ray
        from ray.exceptions import RayError

        try:
            array = ray.get(handle)
        except RayError as error:
            raise WeightSyncError(f"published weights are missing in Ray's object store: {error}") from error
        # Through DLPack, because torch.from_numpy warns about read-only arrays. The tensor owns the array,
        # and the array pins the buffer in shared memory.
        return from_dlpack(array)
