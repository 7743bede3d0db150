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
few buckets for any model size. On CPUs, small buckets stay in the CPU cache from sender to receiver. If both sides are
on one node and have one thread each, buckets are even read while they are filled (see `pieces`).

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
from nemo_rl.models.weights.digest import dtype_by_name, tensor_bytes
from nemo_rl.models.weights.handshake import Address, HandshakeServer, JoinRequest, join
from nemo_rl.models.weights.interfaces import WeightBucket, WeightStream
from nemo_rl.models.weights.pieces import RING_BYTES, PiecewiseBucket, PieceWriter
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


def connect(stream: WeightStream, *, keeps: bool = False, leaves: bool = False, piecewise: bool = False) -> Connection:
    """Join a stream, or report that its receiver never will. Raises `WeightSyncError` if the sender has ended."""
    try:
        return join(stream.address, stream.key, JoinRequest(stream.stream, stream.receiver, keeps, leaves, piecewise))
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


def is_single_threaded() -> bool:
    """Return whether torch has one thread: then buckets are exchanged piece by piece, where possible."""
    return torch.get_num_threads() == 1


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
            piecewise = is_single_threaded() and all(peer.piecewise for peer in group.peers)
            bucket_bytes = self._bucket_bytes
            if keeps or piecewise:
                bucket_bytes = max(bucket_bytes, min(bucket_bytes * _KEPT_BUCKETS, _MAX_KEPT_BUCKET_BYTES))
            if piecewise:
                packer: BucketPacker = _PiecewisePacker(
                    dtype_by_name(dtype), bucket_bytes, self._transport, group, keeps=keeps
                )
            else:
                packer = BucketPacker(
                    dtype_by_name(dtype), bucket_bytes, self._transport, group.send, keep_modules=keeps
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
                over = stack.enter_context(self._transport.over(connection, sends=True))
                yield _Peer(over, request.keeps, request.piecewise and self._transport.piecewise)


class _PiecewisePacker(BucketPacker):
    """Fills buckets while receivers read them; see `pieces`.

    Args:
        dtype, bucket_bytes, transport: see `BucketPacker`. A ring takes less memory than `bucket_bytes`.
        group: the receivers.
        keeps: whether a receiver computes with the received memory.
    """

    def __init__(
        self, dtype: torch.dtype, bucket_bytes: int, transport: WeightTransport, group: _Receivers, *, keeps: bool
    ) -> None:
        super().__init__(dtype, bucket_bytes, transport, group.send, keep_modules=keeps)
        self._group = group
        self._in_ring = not keeps

    def _flush(self) -> None:
        buffer = self._transport.allocate(RING_BYTES if self._in_ring else self._used)
        specs = tuple(spec for spec, _ in self._pending)
        bucket = PiecewiseBucket(specs, self._used, self._transport.put(buffer), self._in_ring)
        with self._group.filling(bucket, buffer) as writer:
            for spec, tensor in self._pending:
                self._digest.add_digested(spec, writer.write(spec, tensor))
        self._pending, self._used = [], 0


@dataclass
class _Peer:
    """A receiver that has joined, and the number of messages that it has not answered."""

    connection: Connection
    keeps: bool
    piecewise: bool
    num_in_flight: int = 0


@dataclass
class _Receivers:
    """The live receivers of a stream, and the buckets that not all of them have loaded."""

    peers: list[_Peer]
    _in_flight: deque[WeightBucket] = field(default_factory=deque)

    def send(self, bucket: WeightBucket) -> None:
        """Send a bucket; returns when the window allows another one."""
        self._announce(bucket)
        self._settle(_WINDOW)

    @contextlib.contextmanager
    def filling(self, bucket: PiecewiseBucket, buffer: torch.Tensor) -> Iterator[PieceWriter]:
        """Announce a bucket, which the caller fills in this context. At its end as `send`, but a ring is free then."""
        self._announce(bucket)
        peers = dict(enumerate(self.peers))
        connections = {number: peer.connection for number, peer in peers.items()}
        writer = PieceWriter(connections, lambda number: self._drop(peers[number]), bucket, tensor_bytes(buffer))
        yield writer
        writer.finish()
        self._settle(0 if bucket.in_ring else _WINDOW)

    def finish(self, digest: str) -> None:
        """Wait until all buckets have been loaded and send the digest."""
        self._settle(0)
        self._to_all(digest)

    def _announce(self, bucket: WeightBucket) -> None:
        self._to_all(bucket)
        self._in_flight.append(bucket)  # its handle keeps the memory until all receivers have loaded it

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
