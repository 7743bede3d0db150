"""How the bytes of one weight bucket get from one process to another. A transport is one class and one line below."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import torch
from torch.utils.dlpack import from_dlpack

from nemo_rl.errors import WeightSyncError
from nemo_rl.utils.names import did_you_mean


class WeightTransport(ABC):
    """Carries flat uint8 buffers from the process that sends weights to those that load them.

    A sender keeps its transport from one update to the next; receivers make one when they need it.

    Attributes:
        publishes: a handle is good for whoever gets it, whenever that is: `WeightSender` may use it.
        streams: `WeightStreamer` may use it.
        every_rank_sends: a stream comes from all ranks of the policy, each of which serves the receivers nearest to it.
        on_gpu: the buffers lie in GPUs' memory, on both sides, and so are the digests computed there.
        may_be_kept: what `get` returns stays as it is for as long as somebody looks at it. Otherwise a receiver of a
            stream has it until it answers.
        bucket_bytes: a good size of a stream's buckets: large ones keep GPUs and links busy.
    """

    publishes: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    every_rank_sends: ClassVar[bool] = False
    on_gpu: ClassVar[bool] = False
    may_be_kept: ClassVar[bool] = True
    bucket_bytes: ClassVar[int] = 128 << 20

    @abstractmethod
    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory for the next bucket, [num_bytes] uint8, for the sender to fill and then to `put`."""

    @abstractmethod
    def put(self, buffer: torch.Tensor) -> Any:
        """Publish what `allocate` returned, filled. The sender does not touch it any more.

        Returns the handle for `WeightBucket.handle`; it holds the bytes for as long as it lives, and can be sent over
        what `over` returns, or pickled where the transport `publishes`.
        """

    @abstractmethod
    def get(self, handle: Any) -> torch.Tensor:
        """The published buffer, [num_bytes] uint8, aligned to 64 bytes; shared, therefore never to be written to.

        The tensor keeps the memory alive, also after the handle and the sender are gone.

        Raises:
            WeightSyncError: the buffer is gone.
        """

    def over(self, connection: Connection, *, sends: bool, keeps: bool = False) -> Connection:
        """What a stream's messages go over. Both sides call it once a receiver has joined, and may talk meanwhile.

        Args:
            sends: whether this is the sender.
            keeps: whether this receiver keeps the memory that it gets.

        Raises:
            OSError, EOFError: the other side is gone.
            WeightSyncError: the two cannot work together.
        """
        return connection

    def settle(self) -> None:  # noqa: B027 - on CPUs nothing is under way when a call has returned
        """Wait until what this process does with buckets is done."""

    def release(self) -> None:  # noqa: B027 - host memory is kept
        """Give back memory that is only kept for the next stream, where it is too dear for that."""


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


def _gloo() -> WeightTransport:
    from nemo_rl.models.weights.pairs import GlooTransport

    return GlooTransport()


def _nccl() -> WeightTransport:
    from nemo_rl.models.weights.pairs import NcclTransport

    return NcclTransport()


def _cuda_ipc() -> WeightTransport:
    from nemo_rl.models.weights.cuda_ipc import CudaIpcTransport

    return CudaIpcTransport()


TRANSPORTS: dict[str, Callable[[], WeightTransport]] = {
    "ray": RayObjectStoreTransport,
    "shared_memory": _shared_memory,
    "gloo": _gloo,
    "cuda_ipc": _cuda_ipc,
    "nccl": _nccl,
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
