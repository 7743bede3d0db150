"""The interface of transports, which carry weight buckets from one process to another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import torch


class WeightTransport(ABC):
    """Carries flat uint8 buffers from the process that sends weights to the processes that load them.

    A sender keeps its transport for all updates; a receiver creates one per update.

    Example:
        Within one process::

            transport = LocalTransport()
            buffer = transport.allocate(num_bytes)
            buffer.copy_(weights)
            assert torch.equal(transport.get(transport.put(buffer)), weights)

    Attributes:
        publishes: `WeightSender` may use it: a handle is valid for any process that gets it, at any time.
        streams: `WeightStreamer` may use it.
        every_rank_sends: all ranks of the policy send a stream, each to the receivers nearest to it. Otherwise rank 0
            sends to all.
        on_gpu: the buffers are in GPU memory on both sides, and the digests are computed there.
        may_be_kept: the buffer that `get` returns keeps its contents as long as it is referenced. Otherwise a receiver
            of a stream may read it until it answers.
        piecewise: receivers may read a buffer that was `put` while the sender fills it, in an order that both agree on.
        bucket_bytes: default size of a stream's buckets. Large buckets keep GPUs and links busy.
    """

    publishes: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    every_rank_sends: ClassVar[bool] = False
    on_gpu: ClassVar[bool] = False
    may_be_kept: ClassVar[bool] = True
    piecewise: ClassVar[bool] = False
    bucket_bytes: ClassVar[int] = 128 << 20

    @abstractmethod
    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return memory for the next bucket, [num_bytes] uint8. The sender fills it and then calls `put`."""

    @abstractmethod
    def put(self, buffer: torch.Tensor) -> Any:
        """Publish a filled buffer that `allocate` returned. The sender must not write to it any more.

        Returns the handle for `WeightBucket.handle`. The bytes stay valid as long as the handle lives. It can be sent
        over the connection that `over` returns, or be pickled if the transport `publishes`.
        """

    @abstractmethod
    def get(self, handle: Any) -> torch.Tensor:
        """Return the published buffer, [num_bytes] uint8, aligned to 64 bytes. It is shared: never write to it.

        The tensor keeps the memory alive, even after the handle and the sender are gone.

        Raises:
            WeightSyncError: the buffer does not exist any more.
        """

    def over(self, connection: Connection, *, sends: bool, keeps: bool = False) -> Connection:
        """Return the connection for a stream's messages. Both sides call this once, after a receiver has joined.

        Both may exchange messages over `connection` during the call.

        Args:
            sends: whether this is the sender.
            keeps: whether this receiver keeps the memory that it gets.

        Raises:
            OSError, EOFError: the other side has ended.
            WeightSyncError: the two sides are incompatible.
        """
        return connection

    def settle(self) -> None:  # noqa: B027 - CPU operations have ended when their call returns
        """Wait until this process's pending operations on buckets have ended."""

    def release(self) -> None:  # noqa: B027 - host memory is kept
        """Free memory that is kept for the next stream, where such memory is scarce."""
