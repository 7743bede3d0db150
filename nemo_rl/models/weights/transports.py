"""How the bytes of one weight bucket get from one process to another. A transport is one class and one line below."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from nemo_rl.errors import WeightSyncError
from nemo_rl.utils.names import did_you_mean


class WeightTransport(ABC):
    """Carries flat uint8 buffers from the process that publishes weights to those that load them."""

    # Whether `put` keeps the buffer itself; then the sender hands over a fresh one for every bucket.
    keeps_buffer: bool = False

    @abstractmethod
    def put(self, buffer: torch.Tensor) -> Any:
        """Publish `buffer`, a one-dimensional contiguous uint8 tensor.

        Returns the handle for `WeightBucket.handle`; it can be pickled, and holds the bytes for as long as it lives.
        Unless `keeps_buffer`, the buffer may be overwritten as soon as this returns.
        """

    @abstractmethod
    def get(self, handle: Any) -> torch.Tensor:
        """The published buffer, [num_bytes] uint8, aligned to 64 bytes; shared, therefore never to be written to.

        The tensor keeps the memory alive, also after the handle and the sender are gone.

        Raises:
            WeightSyncError: the buffer is gone.
        """


class RayObjectStoreTransport(WeightTransport):
    """Ray's object store: shared memory on one node (mapped, not copied), one transfer per node across nodes."""

    def put(self, buffer: torch.Tensor) -> Any:
        import ray

        return ray.put(buffer.numpy())

    def get(self, handle: Any) -> torch.Tensor:
        import ray
        from ray.exceptions import RayError

        try:
            array = ray.get(handle)
        except RayError as error:
            raise WeightSyncError(f"published weights are gone from Ray's object store: {error}") from error
        # Through DLPack, because torch.from_numpy warns of arrays that are not writable. The tensor owns the array,
        # and the array pins the buffer in shared memory.
        return from_dlpack(array)


class LocalTransport(WeightTransport):
    """Within one process: the handle is the buffer."""

    keeps_buffer = True

    def put(self, buffer: torch.Tensor) -> Any:
        return buffer

    def get(self, handle: Any) -> torch.Tensor:
        buffer: torch.Tensor = handle
        return buffer


TRANSPORTS: dict[str, type[WeightTransport]] = {
    "ray": RayObjectStoreTransport,
    "local": LocalTransport,
}


def make_transport(name: str) -> WeightTransport:
    """A transport by its name in `TRANSPORTS`. Raises `WeightSyncError` that names the nearest known one."""
    try:
        return TRANSPORTS[name]()
    except KeyError:
        hint = did_you_mean(name, TRANSPORTS)
        raise WeightSyncError(
            f"unknown weight transport {name!r}.{hint} Known: {', '.join(sorted(TRANSPORTS))}. "
            "Add yours to nemo_rl.models.weights.transports.TRANSPORTS."
        ) from None
