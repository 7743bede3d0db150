"""How the bytes of one weight bucket get from one process to another. A transport is one class and one line below."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from nemo_rl.errors import WeightSyncError
from nemo_rl.utils.names import did_you_mean


class WeightTransport(ABC):
    """Carries flat uint8 buffers from the process that publishes weights to those that load them.

    A sender keeps its transport from one update to the next; receivers make one when they need it.
    """

    @abstractmethod
    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory for the next bucket, [num_bytes] uint8, for the sender to fill and then to `put`."""

    @abstractmethod
    def put(self, buffer: torch.Tensor) -> Any:
        """Publish what `allocate` returned, filled. The sender does not touch it any more.

        Returns the handle for `WeightBucket.handle`; it can be pickled, and holds the bytes for as long as it lives.
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
            raise WeightSyncError(f"published weights are gone from Ray's object store: {error}") from error
        # Through DLPack, because torch.from_numpy warns of arrays that are not writable. The tensor owns the array,
        # and the array pins the buffer in shared memory.
        return from_dlpack(array)


class LocalTransport(WeightTransport):
    """Within one process: the handle is the buffer."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def put(self, buffer: torch.Tensor) -> Any:
        return buffer

    def get(self, handle: Any) -> torch.Tensor:
        buffer: torch.Tensor = handle
        return buffer


def _shared_memory() -> WeightTransport:
    from nemo_rl.models.weights.shared_memory import SharedMemoryTransport  # Linux only

    return SharedMemoryTransport()


TRANSPORTS: dict[str, Callable[[], WeightTransport]] = {
    "ray": RayObjectStoreTransport,
    "shared_memory": _shared_memory,
    "local": LocalTransport,
}


def choose_transport(node_ids: Iterable[str]) -> str:
    """The name of the fastest transport between processes on these nodes (those of sender, driver and receivers)."""
    return "shared_memory" if len(set(node_ids)) == 1 and sys.platform == "linux" else "ray"


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
