"""Weight buckets from one process to another, wherever they are: by NCCL between GPUs, by gloo between CPUs.

Sender and receiver make a torch process group of their own, of two ranks, which belongs to neither's other groups: a
receiver that dies takes nobody with it. Making one takes NCCL a while; so both sides keep it for the next stream.

::

    sender                                                receiver
    ──────                                                ────────
                     ◄── who I am, have I a group of ours ──
    ── address of a store for a new group, or None ──►
    make the group                                        make the group
    ── bucket (its description), and its bytes by the group ──►
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
from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.buffers import ReusedBuffers
from nemo_rl.models.weights.interfaces import WeightBucket
from nemo_rl.models.weights.transport import WeightTransport

_SENDER, _RECEIVER = 0, 1  # ranks of a pair
_TIMEOUT = datetime.timedelta(minutes=10)
# torch's threads that watch over a group end the whole process when the other side is gone, unless told to do no more
# than give the group up (`ErrorHandlingMode` in torch's ProcessGroupNCCL.hpp). Read when a group is made.
_ONLY_CLEAN_UP = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
_Group = Any  # ProcessGroupGloo or ProcessGroupNCCL
_Lend = Callable[[int], torch.Tensor]  # bytes -> memory for a bucket


@dataclass
class _Pair:
    """This process's end of a pair, and memory for what it receives."""

    group: _Group
    buffers: ReusedBuffers


# Pairs of this process that are whole: (the other process, own rank) -> pair.
_pairs: dict[tuple[str, int], _Pair] = {}


@dataclass(frozen=True)
class _Call:
    """What a receiver says first: which process it is, and whether it has a group with the sender's."""

    process: str
    software: str
    pairs: frozenset[str]


@dataclass(frozen=True)
class _Answer:
    """What the sender says then: where to meet for a new group (host, port, prefix); None: take the old one."""

    process: str
    software: str
    meeting: tuple[str, int, str] | None


class PairTransport(WeightTransport):
    """Process groups of two. A bucket's handle is its memory; what `over` returns moves it."""

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
        met: Any = _PairConnection(connection, key, pair, lend)
        return cast(Connection, met)

    def software(self) -> str:
        """What has to be the same on both sides."""
        return ""

    @abstractmethod
    def make_group(self, store: Any, rank: int, host: str) -> _Group:
        """This process's end of a group of two; `host` is its own address."""

    def _meet(self, connection: Connection, *, sends: bool) -> tuple[str, int]:
        """Where in `_pairs` the pair with the other side is, which is made if need be."""
        host = _own_address(connection)
        if sends:
            call: _Call = connection.recv()
            key = (call.process, _SENDER)
            knows = self._process() in call.pairs and key in _pairs
            meeting = None if knows else (host, _store(host).port, secrets.token_hex(8))
            connection.send(_Answer(self._process(), self.software(), meeting))
            other = call.software
        else:
            known = frozenset(process for process, rank in _pairs if rank == _RECEIVER)
            connection.send(_Call(self._process(), self.software(), known))
            answer: _Answer = connection.recv()
            key, meeting, other = (answer.process, _RECEIVER), answer.meeting, answer.software
        if other != self.software():
            raise WeightSyncError(
                f"weights cannot be sent: this worker has {self.software()}, the other side {other}. Give both the "
                "same torch (its NCCL must be the same), or set policy.weight_transport=ray."
            )
        if meeting is not None:
            group = self._new_group(meeting, host, _SENDER if sends else _RECEIVER)
            _pairs[key] = _Pair(group, ReusedBuffers(self.device))
        return key

    def _new_group(self, meeting: tuple[str, int, str], host: str, rank: int) -> _Group:
        address, port, prefix = meeting
        try:
            store = _store(host) if rank == _SENDER else TCPStore(address, port, is_master=False, timeout=_TIMEOUT)
            return self.make_group(PrefixStore(prefix, store), rank, host)
        except RuntimeError as error:
            raise ConnectionError(f"sender and receiver do not meet at {address}:{port}: {error}") from error

    def _process(self) -> str:
        return f"{_process_token(os.getpid())} {type(self).__name__}"


class GlooTransport(PairTransport):
    """TCP between CPUs."""

    device = "cpu"
    bucket_bytes = 16 << 20

    def make_group(self, store: Any, rank: int, host: str) -> _Group:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = _TIMEOUT
        return ProcessGroupGloo(store, rank, 2, options)


class NcclTransport(PairTransport):
    """NVLink, PCIe or the network between GPUs, whatever NCCL finds."""

    device = "cuda"
    on_gpu = True

    def software(self) -> str:
        return f"NCCL {'.'.join(str(part) for part in torch.cuda.nccl.version())}"

    def make_group(self, store: Any, rank: int, host: str) -> _Group:
        from torch.distributed import ProcessGroupNCCL  # not in every build of torch

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
    """A connection over which buckets go with their bytes. The group is kept only if all was well until the end."""

    def __init__(self, connection: Connection, key: tuple[str, int], pair: _Pair, lend: _Lend) -> None:
        self._connection = connection
        self._key = key
        self._pair = pair
        self._lend = lend
        self._sending: deque[Any] = deque()  # torch's handles of what the receiver does not have yet
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
    """torch says `RuntimeError` when the other side is gone; connections say `EOFError`."""
    try:
        return call()
    except RuntimeError as error:
        raise EOFError(str(error)) from error


def _own_address(connection: Connection) -> str:
    """This side's IP address, as the other side sees it; on one node that of loopback."""
    with socket.socket(fileno=os.dup(connection.fileno())) as own:
        return str(own.getsockname()[0]) if own.family != socket.AF_UNIX else "127.0.0.1"


@functools.cache
def _store(host: str) -> Any:
    """Where groups of this process as a sender are made; it listens on one address only."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listener.detach()
    )


@functools.cache
def _process_token(pid: int) -> str:
    """The same for as long as the process lives; a forked one is another."""
    return secrets.token_hex(8)
