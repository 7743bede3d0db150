"""Weight buckets between any two processes: by NCCL between GPUs, by gloo between CPUs.

Sender and receiver create a torch process group of two ranks, separate from all other groups: if a receiver dies, no
other group fails. NCCL takes a while to create a group, so both sides keep it for the next stream::

    sender                                                receiver
    ──────                                                ────────
                     ◄── its process, its existing groups ──
    ── address of a store for a new group, or None ──►
    create the group                                      create the group
    ── description of a bucket; its bytes by the group ──►
"""

from __future__ import annotations

import datetime
import functools
import os
import secrets
import socket
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, ClassVar, cast

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroupGloo,
    TCPStore,
)

from nemo_rl import settings
from nemo_rl.distributed.cluster import ports
from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.buffers import ReusedBuffers
from nemo_rl.models.weights.interfaces import WeightBucket
from nemo_rl.models.weights.transport import WeightTransport

_SENDER, _RECEIVER = 0, 1  # ranks of a pair
_TIMEOUT = datetime.timedelta(minutes=10)
# By default, torch's watchdog thread of a group ends the whole process when the other side dies. In this mode it only
# aborts the group (`ErrorHandlingMode` in torch's ProcessGroupNCCL.hpp). torch reads it when it creates a group.
_ONLY_CLEAN_UP = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
_Group = Any  # ProcessGroupGloo or ProcessGroupNCCL
_Lend = Callable[[int], torch.Tensor]  # bytes -> memory for a bucket


@dataclass
class _Pair:
    """This process's end of a pair, and its receive buffers."""

    group: _Group
    buffers: ReusedBuffers


# Usable pairs of this process: (the other process, this process's rank) -> pair.
_pairs: dict[tuple[str, int], _Pair] = {}


@dataclass(frozen=True)
class _Hello:
    """The receiver's first message: its process, its software, and the processes that it has groups with."""

    process: str
    software: str
    pairs: frozenset[str]


@dataclass(frozen=True)
class _Invitation:
    """The sender's reply: the store of a new group (host, port, prefix); None: use the existing group."""

    process: str
    software: str
    store: tuple[str, int, str] | None


class PairTransport(WeightTransport):
    """Sends buckets over process groups of two. A handle is the buffer; the connection of `over` transfers it."""

    publishes = False
    streams = True
    every_rank_sends = True
    device: ClassVar[str]

    def __init__(self) -> None:
        self._buffers = ReusedBuffers(self.device)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return self._buffers.lend(num_bytes)

    def put(self, buffer: torch.Tensor) -> Any:
        return buffer

    def get(self, handle: Any) -> torch.Tensor:
        buffer: torch.Tensor = handle
        return buffer

    def over(self, connection: Connection, *, sends: bool, keeps: bool = False) -> Connection:
        key = self._meet(connection, sends=sends)
        pair = _pairs[key]
        lend = functools.partial(torch.empty, dtype=torch.uint8, device=self.device) if keeps else pair.buffers.lend
        over_pair: Any = _PairConnection(connection, key, pair, lend)
        return cast(Connection, over_pair)

    def software(self) -> str:
        """Return the software that must be the same on both sides."""
        return ""

    @abstractmethod
    def make_group(self, store: Any, rank: int, host: str) -> _Group:
        """Create this process's end of a group of two. `host` is this process's address."""

    def _meet(self, connection: Connection, *, sends: bool) -> tuple[str, int]:
        """Return the key in `_pairs` of the pair with the other side, which is created if it does not exist."""
        host = _own_address(connection)
        if sends:
            hello: _Hello = connection.recv()
            key = (hello.process, _SENDER)
            exists = self._process() in hello.pairs and key in _pairs
            new_store = None if exists else (host, _store(host).port, secrets.token_hex(8))
            connection.send(_Invitation(self._process(), self.software(), new_store))
            other_software = hello.software
        else:
            known = frozenset(process for process, rank in _pairs if rank == _RECEIVER)
            connection.send(_Hello(self._process(), self.software(), known))
            invitation: _Invitation = connection.recv()
            key, new_store = (invitation.process, _RECEIVER), invitation.store
            other_software = invitation.software
        if other_software != self.software():
            raise WeightSyncError(
                f"weights cannot be sent: this worker has {self.software()}, the other side {other_software}. Install "
                "the same torch on both sides (its NCCL must be the same), or set policy.weight_transport=ray."
            )
        if new_store is not None:
            group = self._new_group(new_store, host, _SENDER if sends else _RECEIVER)
            _pairs[key] = _Pair(group, ReusedBuffers(self.device))
        return key

    def _new_group(self, new_store: tuple[str, int, str], host: str, rank: int) -> _Group:
        address, port, prefix = new_store
        try:
            store = _store(host) if rank == _SENDER else TCPStore(address, port, is_master=False, timeout=_TIMEOUT)
            return self.make_group(PrefixStore(prefix, store), rank, host)
        except RuntimeError as error:
            raise ConnectionError(f"sender and receiver cannot connect at {address}:{port}: {error}") from error

    def _process(self) -> str:
        return f"{_process_token(os.getpid())} {type(self).__name__}"


class GlooTransport(PairTransport):
    """Sends weights between CPUs over TCP."""

    device = "cpu"
    bucket_bytes = 16 << 20

    def make_group(self, store: Any, rank: int, host: str) -> _Group:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = _TIMEOUT
        return ProcessGroupGloo(store, rank, 2, options)


class NcclTransport(PairTransport):
    """Sends weights between GPUs with NCCL, over NVLink, PCIe or the network."""

    device = "cuda"
    on_gpu = True

    def software(self) -> str:
        return f"NCCL {'.'.join(str(part) for part in torch.cuda.nccl.version())}"

    def make_group(self, store: Any, rank: int, host: str) -> _Group:
        from torch.distributed import ProcessGroupNCCL  # CPU builds of torch lack it

        options = ProcessGroupNCCL.Options()
        options._timeout = _TIMEOUT
        with settings.exported(_ONLY_CLEAN_UP):
            return ProcessGroupNCCL(store, rank, 2, options)

    def settle(self) -> None:
        torch.cuda.current_stream().synchronize()

    def release(self) -> None:
        self._buffers.clear()
        for pair in _pairs.values():
            pair.buffers.clear()


class _PairConnection:
    """A connection that transfers the bytes of buckets too. The group is kept only if the stream ends normally."""

    def __init__(self, connection: Connection, key: tuple[str, int], pair: _Pair, lend: _Lend) -> None:
        self._connection = connection
        self._key = key
        self._pair = pair
        self._lend = lend
        self._sending: deque[Any] = deque()  # torch's handles of pending sends
        self._is_over = False

    def send(self, message: Any) -> None:
        if not isinstance(message, WeightBucket):
            self._connection.send(message)
            self._is_over = isinstance(message, str)
            return
        self._connection.send(replace(message, handle=None))
        self._sending.append(_or_eof(lambda: self._pair.group.send([message.handle], _RECEIVER, 0)))

    def recv(self) -> Any:
        message = self._connection.recv()
        if isinstance(message, WeightBucket):
            buffer = self._lend(message.num_bytes)
            _or_eof(lambda: self._pair.group.recv([buffer], _SENDER, 0).wait())
            return replace(message, handle=buffer)
        if self._sending:
            self._sending.popleft()
        self._is_over = isinstance(message, str)
        return message

    def close(self) -> None:
        self._connection.close()
        if not self._is_over:
            self._is_over = True
            self._pair.group.abort()
            if _pairs.get(self._key) is self._pair:
                del _pairs[self._key]

    def __enter__(self) -> _PairConnection:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _or_eof(call: Callable[[], Any]) -> Any:
    """Raise `EOFError`, as connections do, instead of torch's `RuntimeError` when the other side has ended."""
    try:
        return call()
    except RuntimeError as error:
        raise EOFError(str(error)) from error


def _own_address(connection: Connection) -> str:
    """Return this side's IP address as the other side sees it; the loopback address on the same node."""
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        return str(duplicate.getsockname()[0]) if duplicate.family != socket.AF_UNIX else "127.0.0.1"


@functools.cache
def _store(host: str) -> Any:
    """Return the store for the groups in which this process sends. It listens on `host` only."""
    listener = ports.listen(host)
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listener.detach()
    )


@functools.cache
def _process_token(pid: int) -> str:
    """Return a random token of this process. A forked process has another pid, hence another token."""
    return secrets.token_hex(8)
