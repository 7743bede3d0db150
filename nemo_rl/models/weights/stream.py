"""The policy's side of a stream: buckets are filled, sent and loaded at the same time, in memory that is used again.

::

    sender (a worker of the policy)                       receivers (generation)
    ───────────────────────────────                       ──────────────────────
    listens                            ◄── join ──        connect
    fill bucket, put                   ── bucket ──►      read it, load its tensors
    fill the next one meanwhile        ◄── loaded ──      let go of it
    at most `_WINDOW` under way
    all sent                           ── digest ──►      compare with the digest over their own memory

Only descriptions go over the socket, which is one of the node or, for receivers elsewhere, of TCP: the bytes go by a
`WeightTransport`, which fills a buffer again when its last reader has let go of it. So the extra memory is a few
buckets, whatever the model's size, and on CPUs small buckets stay in the processor's cache on their way: the whole
costs about what one copy does.

Receivers that compute with what they got (`keeps`) never let go of it: theirs is the memory. A receiver that ends is
left out; one that ended before it could join is reported by the driver (`leave`). By the transport either rank 0 of the
policy sends to all receivers, or every rank to some of them (`assign_senders`).
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import struct
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge

import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.digest import dtype_by_name
from nemo_rl.models.weights.interfaces import WeightBucket, WeightStream
from nemo_rl.models.weights.sender import BucketPacker
from nemo_rl.models.weights.transport import WeightTransport
from nemo_rl.models.weights.transports import make_transport

# Who has come in has so many seconds to show the key: what does not speak our language does not stay.
_HANDSHAKE_S = 30
# Buckets that receivers have not answered for: one that they load, one that waits for them.
_WINDOW = 2
# Receivers that keep what they get take it in larger buckets: each of them may be a mapping and an open file.
_KEPT_BUCKETS = 8
_MAX_KEPT_BUCKET_BYTES = 64 << 20


# Address of a sender's socket (a name on its node, or host and port) and the key that admits receivers.
Endpoint = tuple[str | tuple[str, int], bytes]


@dataclass(frozen=True)
class Joined:
    """What a receiver says first. `keeps`: it computes with the received memory; `leaves`: it will not come."""

    stream: int
    receiver: int
    keeps: bool = False
    leaves: bool = False


def connect(stream: WeightStream, *, keeps: bool = False, leaves: bool = False) -> Connection:
    """Join a stream, or report that its receiver will not. Raises `WeightSyncError` when the sender is not there."""
    try:
        connection = Client(stream.address, authkey=stream.key)
        connection.send(Joined(stream.stream, stream.receiver, keeps, leaves))
    except (OSError, EOFError, AuthenticationError) as error:
        raise sender_ended(stream) from error
    return connection


@contextlib.contextmanager
def half_of_the_threads() -> Iterator[None]:
    """Both sides of a stream work at the same time, on one node: each takes half of what it would take alone."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def sender_ended(stream: WeightStream) -> WeightSyncError:
    """The error of a receiver whose sender is gone."""
    return WeightSyncError(
        f"the policy's worker that sends the weights of version {stream.version} has ended or given up: its own error "
        "says why. If there is none, it cannot be reached from here (workers in several containers, or ports between "
        "nodes that are closed): set policy.weight_transport=ray."
    )


class WeightStreamer:
    """Sends a model's weights again and again.

    Args:
        transport: a name in `nemo_rl.models.weights.transports.TRANSPORTS`, of one that `streams`.
        bucket_bytes: size of a bucket; a tensor that is larger has a bucket of its own. None: what suits the transport.

    Raises:
        WeightSyncError: there is no such transport, or it does not stream.
    """

    def __init__(self, transport: str = "shared_memory", bucket_bytes: int | None = None) -> None:
        self._transport: WeightTransport = make_transport(transport)
        if not self._transport.streams:
            raise WeightSyncError(f"weights cannot be streamed by the transport {transport!r}, only published")
        self._bucket_bytes = bucket_bytes or self._transport.bucket_bytes
        self._door: _Door | None = None

    def endpoint(self, host: str | None = None) -> Endpoint:
        """Address and key for `WeightStream`; from now on receivers can come.

        Args:
            host: this node's IP address, for receivers on other nodes too. None: only those of this node can come.
        """
        if self._door is None:
            self._door = _Door(host)
        return self._door.address, self._door.key

    def send(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        version: int,
        dtype: str,
        stream: int,
        receivers: Collection[int],
    ) -> str:
        """Send weights to `receivers`, waiting for each to join or to be reported gone. Returns the digest of all.

        Args:
            named_tensors, version, dtype: as for `WeightSender.publish`.
            stream: number of this stream, which receivers ask for.
            receivers: who is to join.

        Raises:
            WeightSyncError: a name comes twice, there is no tensor at all, or dtype is unknown.
        """
        with contextlib.ExitStack() as stack, half_of_the_threads():
            stack.callback(self._transport.release)
            group = _Receivers(self._joined(stream, set(receivers), stack))
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

    def _joined(self, stream: int, waiting: set[int], stack: contextlib.ExitStack) -> Iterator[_Peer]:
        self.endpoint()
        assert self._door is not None
        while waiting:
            connection, joined = self._door.next()
            stack.callback(connection.close)
            if joined.stream != stream or joined.receiver not in waiting:
                connection.close()
                continue
            waiting.discard(joined.receiver)
            if joined.leaves:
                connection.close()
                continue
            with contextlib.suppress(OSError, EOFError):  # it ended right after it had joined
                yield _Peer(stack.enter_context(self._transport.over(connection, sends=True)), joined.keeps)


class _Door:
    """Where receivers come in: a socket, and threads that let in whoever has the key."""

    def __init__(self, host: str | None) -> None:
        self.key = secrets.token_bytes(32)
        # In the abstract namespace: no file is left behind, whoever is killed. The key decides who is let in.
        own = f"\0nemo_rl_weights_{os.getpid()}_{secrets.token_hex(8)}"
        self._listener = Listener(own if host is None else (host, 0), backlog=128)
        self.address: str | tuple[str, int] = self._listener.address
        self._arrived: queue.SimpleQueue[tuple[Connection, Joined]] = queue.SimpleQueue()
        threading.Thread(target=self._open, name="weight streams", daemon=True).start()

    def next(self) -> tuple[Connection, Joined]:
        """Wait for the next receiver."""
        return self._arrived.get()

    def _open(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # it was gone again
                continue
            # Each in a thread of its own: a stranger that says nothing keeps nobody waiting.
            threading.Thread(target=self._admit, args=(connection,), name="receiver of weights", daemon=True).start()

    def _admit(self, connection: Connection) -> None:
        try:
            _set_read_timeout(connection, _HANDSHAKE_S)
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            joined = connection.recv()
            _set_read_timeout(connection, 0)
            self._arrived.put((connection, joined))
        except (OSError, EOFError, AuthenticationError):
            connection.close()  # it ended, or was never one of ours


def _set_read_timeout(connection: Connection, seconds: int) -> None:
    """Let reading raise `BlockingIOError` after a while; 0: never."""
    with socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", seconds, 0))


@dataclass
class _Peer:
    """A receiver, as the sender sees it."""

    connection: Connection
    keeps: bool
    num_under_way: int = 0


@dataclass
class _Receivers:
    """All receivers of a stream that are still there, and the buckets that not all of them have loaded."""

    found: Iterable[_Peer]
    peers: list[_Peer] = field(init=False)
    _under_way: deque[WeightBucket] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.peers = list(self.found)

    def send(self, bucket: WeightBucket) -> None:
        """Send a bucket; returns when the next one may be filled."""
        self._to_all(bucket)
        self._under_way.append(bucket)  # its handle keeps the memory until the receivers have it
        self._settle(_WINDOW)

    def finish(self, digest: str) -> None:
        """Tell the digest when all buckets have been loaded."""
        self._settle(0)
        self._to_all(digest)

    def _to_all(self, message: WeightBucket | str) -> None:
        for peer in self.peers.copy():
            try:
                peer.connection.send(message)
            except (OSError, EOFError):
                self._leave_out(peer)
            peer.num_under_way += 1

    def _settle(self, num_left: int) -> None:
        for peer in self.peers.copy():
            try:
                while peer.num_under_way > num_left:
                    peer.connection.recv()
                    peer.num_under_way -= 1
            except (OSError, EOFError):
                self._leave_out(peer)
        while len(self._under_way) > num_left:
            self._under_way.popleft()

    def _leave_out(self, peer: _Peer) -> None:
        """It has ended. Closed at once: what still waits for it on a GPU may keep what comes later from starting."""
        self.peers.remove(peer)
        peer.connection.close()
