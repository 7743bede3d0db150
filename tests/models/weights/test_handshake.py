"""Handshakes of weight streams: who is admitted, and what others cost the sender."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from nemo_rl.distributed.cluster import ports
from nemo_rl.models.weights import handshake
from nemo_rl.models.weights.handshake import MAX_PENDING, HandshakeServer, JoinRequest, join

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets need Linux")

REQUEST = JoinRequest(stream=3, receiver=5, keeps=True)
NOBODY = 65_534


@pytest.fixture(params=[None, "127.0.0.1"], ids=["local", "tcp"])
def server(request: pytest.FixtureRequest) -> HandshakeServer:
    return HandshakeServer(request.param)


def dial(server: HandshakeServer) -> socket.socket:
    family = socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET
    peer = socket.socket(family, socket.SOCK_STREAM)
    peer.connect(server.address)
    return peer


def is_closed(peer: socket.socket) -> bool:
    """Read until the server closes the connection."""
    with contextlib.suppress(ConnectionResetError):
        while peer.recv(4096):
            pass
    return True


def assert_admits(server: HandshakeServer) -> None:
    """A receiver with the key joins, and both sides can talk."""
    theirs = join(server.address, server.key, REQUEST)
    ours, request = server.next()
    assert request == REQUEST
    theirs.send({"any": "thing"})
    assert ours.recv() == {"any": "thing"}
    ours.send(None)
    assert theirs.recv() is None
    theirs.close()
    ours.close()


def answer_to(nonce: bytes, key: bytes, request: bytes = REQUEST.pack(), side: bytes = b"receiver") -> bytes:
    own = b"n" * 32
    return own + request + handshake._proof(key, side, nonce, own, request)


def test_receiver_is_admitted(server: HandshakeServer) -> None:
    for _ in range(3):
        assert_admits(server)


def test_address_of_a_tcp_server_is_in_the_block_of_endpoints() -> None:
    _, port = HandshakeServer("127.0.0.1").address
    block = ports.block_range("endpoints")
    assert block is None or block[0] <= port <= block[1]


def test_receiver_with_another_key_is_rejected(server: HandshakeServer) -> None:
    with pytest.raises(OSError, match="closed|reset"):
        join(server.address, b"guessed", REQUEST)
    assert_admits(server)


def test_sender_with_another_key_is_rejected() -> None:
    """A process that listens at a sender's address cannot make a receiver unpickle anything."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def serve() -> None:
            peer, _ = impostor.accept()
            with peer:
                peer.sendall(b"n" * 32)
                size = len(answer_to(b"n" * 32, b"key"))
                while size:
                    size -= len(peer.recv(size))
                peer.sendall(b"p" * 32)
                is_closed(peer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(OSError, match="another key"):
            join(impostor.getsockname(), b"key", REQUEST)
        thread.join()


@pytest.mark.parametrize("forgery", ["random", "replayed", "reflected", "other request", "other side"])
def test_forged_proof_is_rejected(server: HandshakeServer, forgery: str) -> None:
    with dial(server) as other, dial(server) as peer:
        earlier, nonce = other.recv(32, socket.MSG_WAITALL), peer.recv(32, socket.MSG_WAITALL)
        assert earlier != nonce
        valid = answer_to(nonce, server.key)
        forged = {
            "random": valid[:-32] + os.urandom(32),
            "replayed": answer_to(earlier, server.key),
            "reflected": nonce + REQUEST.pack() + nonce,
            "other request": valid[:32] + JoinRequest(3, 6).pack() + valid[-32:],
            "other side": answer_to(nonce, server.key, side=b"sender"),
        }[forgery]
        peer.sendall(forged)
        assert is_closed(peer)
    assert_admits(server)


def num_accepted(server: HandshakeServer) -> int:
    """Return how many connections the server holds open. Other code of this process has sockets, too."""
    address = server.address.replace("\0", "@") if isinstance(server.address, str) else server.address
    sockets = psutil.Process().net_connections("all")
    return sum(item.laddr == address for item in sockets) - 1  # without the one that listens


def test_silent_connections_are_bounded(server: HandshakeServer) -> None:
    """They cost no thread, and at most `MAX_PENDING` descriptors. The oldest is replaced, so receivers get in."""
    threads = threading.active_count()
    count = 5 * MAX_PENDING
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(server)) for _ in range(count)]
        for peer in silent[:-MAX_PENDING]:
            assert is_closed(peer)
        assert 0 < num_accepted(server) <= MAX_PENDING + 1
        assert threading.active_count() == threads
        assert_admits(server)
        assert is_closed(silent[-MAX_PENDING])
        # The others are still within their time.
        silent[-1].setblocking(False)
        assert len(silent[-1].recv(4096)) == 32
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)


@pytest.fixture
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.5)


@pytest.mark.parametrize("num_bytes", [0, 1, 60])
def test_one_deadline_ends_a_handshake(server: HandshakeServer, short_time: None, num_bytes: int) -> None:
    """A peer that sends a byte from time to time gains no time."""
    with dial(server) as peer:
        with contextlib.suppress(ConnectionError):
            for _ in range(num_bytes):
                peer.sendall(b"x")
                threading.Event().wait(0.02)
        assert is_closed(peer)
    assert_admits(server)


def test_receiver_gives_up_on_a_silent_sender(short_time: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError, match="timed out"):
        join(silent.getsockname(), b"key", REQUEST)


def test_join_waits_for_a_slow_sender_without_limit_afterwards(server: HandshakeServer, short_time: None) -> None:
    theirs = join(server.address, server.key, REQUEST)
    ours, _ = server.next()
    assert not theirs.poll(1.0)
    ours.send("late")
    assert theirs.recv() == "late"


def _knock_as_nobody(address: str, result: multiprocessing.connection.Connection) -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.connect(address)
    result.send(peer.recv(1))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_user_is_rejected_on_a_local_socket() -> None:
    server = HandshakeServer(None)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_knock_as_nobody, args=(server.address, there))
    process.start()
    assert here.poll(60)
    assert here.recv() == b""  # closed without a nonce
    process.join()
    assert_admits(server)


@pytest.fixture
def few_descriptors() -> Iterator[list[int]]:
    """Use up this process's file descriptors, except for a few."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 8, limits[1]))
    taken: list[int] = []
    yield taken
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_server_survives_a_lack_of_descriptors(server: HandshakeServer, few_descriptors: list[int]) -> None:
    assert_admits(server)
    with dial(server) as first:
        assert len(first.recv(32, socket.MSG_WAITALL)) == 32
        waiting = socket.socket(first.family, socket.SOCK_STREAM)
        with contextlib.suppress(OSError):
            while True:
                few_descriptors.append(os.dup(0))
        waiting.connect(server.address)  # accepted by the kernel; the server has no descriptor for it
        os.close(few_descriptors.pop())
        assert len(waiting.recv(32, socket.MSG_WAITALL)) == 32
        waiting.close()
