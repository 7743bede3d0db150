"""Connects the receivers of a weight stream to its sender. Each side proves that it knows the sender's key.

::

    receiver                                                sender
    ────────                                                ──────
    connect                       ───────────────────►      close a connection of another user (local sockets)
                                  ◄──── its nonce ─────     draw a nonce
    nonce, request, proof         ───────────────────►      check the proof
    check the proof               ◄──── its proof ─────     hand the connection to the stream

A proof is an HMAC-SHA256 over the side that sends it, both nonces and the request, by a key that the driver passes to
both sides. So a recorded proof is useless later, and in the other direction. Nothing is unpickled before both have been
checked.

All handshakes run in one thread. A connection that has not authenticated costs its descriptor: at most `MAX_PENDING`,
each for at most `HANDSHAKE_S`. One more replaces the oldest, so silent peers cannot keep receivers out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import queue
import secrets
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection

from nemo_rl.distributed.cluster import ports

HANDSHAKE_S = 30.0
MAX_PENDING = 32
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
# How long to wait if no connection can be accepted, because this process has no more file descriptors.
_ACCEPT_RETRY_S = 0.1

# A name on this node, or host and port.
Address = str | tuple[str, int]


@dataclass(frozen=True)
class JoinRequest:
    """What a receiver asks for.

    Attributes:
        stream, receiver: see `WeightStream`.
        keeps: it computes with the received memory.
        leaves: it will never join.
        piecewise: it can read buckets while they are filled; see `pieces`.
    """

    stream: int
    receiver: int
    keeps: bool = False
    leaves: bool = False
    piecewise: bool = False

    def pack(self) -> bytes:
        return _REQUEST.pack(self.stream, self.receiver, self.keeps, self.leaves, self.piecewise)

    @staticmethod
    def unpack(data: bytes) -> JoinRequest:
        return JoinRequest(*_REQUEST.unpack(data))


_REQUEST = struct.Struct("!qq???")


def join(address: Address, key: bytes, request: JoinRequest) -> Connection:
    """Connect to a sender as a receiver.

    Raises:
        OSError: the sender has ended or does not answer, or the other side has another key.
    """
    if isinstance(address, str):
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        peer = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        peer.connect(address)
        peer.settimeout(HANDSHAKE_S)
        theirs = _receive(peer, _NONCE_BYTES)
        ours, packed = secrets.token_bytes(_NONCE_BYTES), request.pack()
        peer.sendall(ours + packed + _proof(key, b"receiver", theirs, ours, packed))
        _check(_receive(peer, _PROOF_BYTES), _proof(key, b"sender", theirs, ours, packed))
        peer.settimeout(None)
        return Connection(peer.detach())
    except BaseException:
        peer.close()
        raise


class HandshakeServer:
    """Accepts receivers on a socket.

    Args:
        host: this node's IP address, to accept receivers on other nodes too. None: accept this node's only.

    Attributes:
        address: where receivers connect.
        key: authenticates them.
    """

    def __init__(self, host: str | None) -> None:
        self.key = secrets.token_bytes(32)
        self._is_local = host is None
        self._socket = _local_socket() if host is None else ports.listen(host)
        self._socket.setblocking(False)
        name = self._socket.getsockname()
        self.address: Address = name.decode() if isinstance(name, bytes) else name
        self._joined: queue.SimpleQueue[tuple[Connection, JoinRequest]] = queue.SimpleQueue()
        threading.Thread(target=lambda: asyncio.run(self._serve()), name="weight streams", daemon=True).start()

    def next(self) -> tuple[Connection, JoinRequest]:
        """Wait for the next authenticated connection and its request."""
        return self._joined.get()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        pending: deque[asyncio.Task[None]] = deque()  # the oldest first
        while True:
            try:
                peer, _ = await loop.sock_accept(self._socket)
            except OSError:
                await asyncio.sleep(_ACCEPT_RETRY_S)
                continue
            if self._is_local and _user_of(peer) != os.geteuid():
                peer.close()
                continue
            pending = deque(task for task in pending if not task.done())
            if len(pending) == MAX_PENDING:
                pending.popleft().cancel()
            pending.append(asyncio.create_task(self._admit(peer)))
            await asyncio.sleep(0)  # to the other connections: accepting alone may never wait

    async def _admit(self, peer: socket.socket) -> None:
        # Closed at the end, unless it is handed over. An error: the peer has ended, is silent, or has another key.
        with peer, contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(HANDSHAKE_S):
                request = await self._authenticate(peer)
            peer.setblocking(True)
            self._joined.put((Connection(peer.detach()), request))

    async def _authenticate(self, peer: socket.socket) -> JoinRequest:
        loop = asyncio.get_running_loop()
        ours = secrets.token_bytes(_NONCE_BYTES)
        await loop.sock_sendall(peer, ours)
        answer = b""
        size = _NONCE_BYTES + _REQUEST.size + _PROOF_BYTES
        while len(answer) < size:
            answer += _not_empty(await loop.sock_recv(peer, size - len(answer)))
        theirs, packed, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:-_PROOF_BYTES], answer[-_PROOF_BYTES:]
        _check(proof, _proof(self.key, b"receiver", ours, theirs, packed))
        await loop.sock_sendall(peer, _proof(self.key, b"sender", ours, theirs, packed))
        return JoinRequest.unpack(packed)


def _local_socket() -> socket.socket:
    """Listen under a name of the abstract namespace, which leaves no file behind if the process is killed."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0nemo_rl_weights_{os.getpid()}_{secrets.token_hex(8)}")
    listener.listen(128)
    return listener


def _user_of(peer: socket.socket) -> int:
    """Return the user id of the process that has connected to a local socket."""
    _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)


def _proof(key: bytes, side: bytes, sender_nonce: bytes, receiver_nonce: bytes, request: bytes) -> bytes:
    # All parts but the side have fixed lengths, so no two inputs have the same concatenation.
    return hmac.digest(key, side + sender_nonce + receiver_nonce + request, "sha256")


def _check(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise ConnectionRefusedError("the other side has another key")


def _receive(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += _not_empty(peer.recv(size - len(data)))
    return data


def _not_empty(data: bytes) -> bytes:
    if not data:
        raise ConnectionResetError("the other side has closed the connection")
    return data
