"""The sender of a stream: buckets are filled, sent and loaded at the same time, in reused memory.

::

    sender (a policy worker)                              receivers (generation)
    ────────────────────────                              ──────────────────────
    listen                             ◄── join ──        connect
    fill a bucket, put it              ── bucket ──►      read it, load its tensors
    fill the next one                  ◄── loaded ──      release it
    (at most `_WINDOW` are in flight)
    all sent                           ── digest ──►      compare with the digest of their own memory

Only descriptions go over the socket: a Unix socket, or TCP for receivers on other nodes (see `handshake`). A
`WeightTransport` carries the bytes and reuses a buffer when its last reader has released it. So the extra memory is a
few buckets for any model size. On CPUs, small buckets stay in the CPU cache from sender to receiver, and a stream costs
about as much as one copy.

Receivers that compute with the received memory (`keeps`) never release it, so they need memory of the model's size. A
receiver that ends is dropped; the driver reports one that ended before it could join (`leave`). Depending on the
transport, rank 0 of the policy sends to all receivers, or every rank sends to some of them (`assign_senders`).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.digest import dtype_by_name
from nemo_rl.models.weights.handshake import Address, HandshakeServer, JoinRequest, join
from nemo_rl.models.weights.interfaces import WeightBucket, WeightStream
from nemo_rl.models.weights.sender import BucketPacker
from nemo_rl.models.weights.transport import WeightTransport
from nemo_rl.models.weights.transports import make_transport

# Buckets in flight per receiver: one that it loads and one that waits.
_WINDOW = 2
# Receivers that keep the memory get larger buckets, because each bucket may be a mapping and an open file.
_KEPT_BUCKETS = 8
_MAX_KEPT_BUCKET_BYTES = 64 << 20

# Address of a sender's socket and the key that admits receivers.
Endpoint = tuple[Address, bytes]


def connect(stream: WeightStream, *, keeps: bool = False, leaves: bool = False) -> Connection:
    """Join a stream, or report that its receiver never will. Raises `WeightSyncError` if the sender has ended."""
    try:
        return join(stream.address, stream.key, JoinRequest(stream.stream, stream.receiver, keeps, leaves))
    except OSError as error:
        raise sender_ended(stream) from error


@contextlib.contextmanager
def half_of_the_threads() -> Iterator[None]:
    """Halve torch's threads: both sides of a stream compute at the same time, usually on one node."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def sender_ended(stream: WeightStream) -> WeightSyncError:
    """Return the error of a receiver whose sender has ended."""
    return WeightSyncError(
        f"the policy worker that sends the weights of version {stream.version} has ended or stopped: see its error. "
        "If it has none, this process cannot reach it (workers in several containers, or closed ports between nodes): "
        "set policy.weight_transport=ray."
    )


class WeightStreamer:
    """Streams successive versions of a model's weights.

    Example:
        Send to receiver 0, which iterates over `receive(WeightStream(1, "shared_memory", address, key, 1, 0))`::

            streamer = WeightStreamer("shared_memory")
            address, key = streamer.endpoint()
            digest = streamer.send(model.named_parameters(), version=1, dtype="bfloat16", stream=1, receivers=[0])

    Args:
        transport: a name in `nemo_rl.models.weights.transports.TRANSPORTS` whose transport `streams`.
        bucket_bytes: size of a bucket; a larger tensor gets a bucket to itself. None: the transport's default.

    Raises:
        WeightSyncError: the transport is unknown or does not stream.
    """

    def __init__(self, transport: str = "shared_memory", bucket_bytes: int | None = None) -> None:
        self._transport: WeightTransport = make_transport(transport)
        if not self._transport.streams:
            raise WeightSyncError(f"the transport {transport!r} can only publish weights, not stream them")
        self._bucket_bytes = bucket_bytes or self._transport.bucket_bytes
        self._server: HandshakeServer | None = None

    def endpoint(self, host: str | None = None) -> Endpoint:
        """Start to accept receivers; returns the address and the key for `WeightStream`.

        Args:
            host: this node's IP address, to accept receivers on other nodes too. None: accept this node's only.
        """
        if self._server is None:
            self._server = HandshakeServer(host)
        return self._server.address, self._server.key

    def send(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        version: int,
        dtype: str,
        stream: int,
        receivers: Collection[int],
    ) -> str:
        """Wait until each receiver has joined or has been reported dead, and send the weights. Returns their digest.

        Args:
            named_tensors, version, dtype: see `WeightSender.publish`.
            stream: number of this stream, which receivers request.
            receivers: numbers of the receivers.

        Raises:
            WeightSyncError: a name occurs twice, there are no tensors, or dtype is unknown.
        """
        with contextlib.ExitStack() as stack, half_of_the_threads():
            stack.callback(self._transport.release)
            group = _Receivers(list(self._accept(stream, set(receivers), stack)))
            keeps = any(peer.keeps for peer in group.peers)
            bucket_bytes = self._bucket_bytes
            if keeps:
                bucket_bytes = max(bucket_bytes, min(bucket_bytes * _KEPT_BUCKETS, _MAX_KEPT_BUCKET_BYTES))
            packer = BucketPacker(
                dtype_by_name(dtype),
                bucket_bytes,
                self._transport,
                group.send,
                keep_modules=keeps,
            )
            digest = packer.pack(named_tensors, version)
            group.finish(digest)
        return digest

    def _accept(self, stream: int, missing: set[int], stack: contextlib.ExitStack) -> Iterator[_Peer]:
        """Yield the receivers of a stream as they join, until none is missing."""
        self.endpoint()
        assert self._server is not None
        while missing:
            connection, request = self._server.next()
            stack.callback(connection.close)
            if request.stream != stream or request.receiver not in missing:
                connection.close()
                continue
            missing.discard(request.receiver)
            if request.leaves:
                connection.close()
                continue
            with contextlib.suppress(OSError, EOFError):  # the receiver ended right after it had joined
                yield _Peer(stack.enter_context(self._transport.over(connection, sends=True)), request.keeps)


@dataclass
class _Peer:
    """A receiver that has joined, and the number of messages that it has not answered."""

    connection: Connection
    keeps: bool
    num_in_flight: int = 0


@dataclass
class _Receivers:
    """The live receivers of a stream, and the buckets that not all of them have loaded."""

    peers: list[_Peer]
    _in_flight: deque[WeightBucket] = field(default_factory=deque)

    def send(self, bucket: WeightBucket) -> None:
        """Send a bucket; returns when the window allows another one."""
        self._to_all(bucket)
        self._in_flight.append(bucket)  # its handle keeps the memory until all receivers have loaded it
        self._settle(_WINDOW)

    def finish(self, digest: str) -> None:
        """Wait until all buckets have been loaded and send the digest."""
        self._settle(0)
        self._to_all(digest)

    def _to_all(self, message: WeightBucket | str) -> None:
        for peer in self.peers.copy():
            try:
                peer.connection.send(message)
            except (OSError, EOFError):
                self._drop(peer)
            peer.num_in_flight += 1

    def _settle(self, max_in_flight: int) -> None:
        for peer in self.peers.copy():
            try:
                while peer.num_in_flight > max_in_flight:
                    peer.connection.recv()
                    peer.num_in_flight -= 1
            except (OSError, EOFError):
                self._drop(peer)
        while len(self._in_flight) > max_in_flight:
            self._in_flight.popleft()

    def _drop(self, peer: _Peer) -> None:
        """Drop a receiver that has ended.

        Its connection is closed at once: operations that wait for it on a GPU could block later ones.
        """
        self.peers.remove(peer)
        peer.connection.close()
