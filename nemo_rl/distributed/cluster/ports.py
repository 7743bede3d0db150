"""Free TCP ports of the machine that this process runs on.

The kernel gives the ports of `ip_local_port_range` to any client socket, so a free port of that range may be taken
before the process that it was promised to listens there. Ports are therefore chosen outside of it, from one block per
use: a server of one use that tries the ports after its first one never takes a port that was promised for another.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal, get_args

from nemo_rl.errors import ClusterError

# The process group of a worker group, engines that connect several workers, servers of a worker's own, Ray's agents.
Block = Literal["master", "engines", "endpoints", "agents"]

_KERNEL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_IANA_RANGE = (49_152, 65_535)  # of systems without that file
# Above the ports of Ray's workers (10002 to 19999) and below the node ports of Kubernetes (30000 to 32767); else any.
_WINDOWS = (range(20_000, 30_000), range(5_000, 65_536))
_MIN_PORTS = 2_000  # of all blocks

_promises: list[socket.socket] = []  # closed by the kernel when this process ends


def free_ports(
    count: int,
    low: int | None = None,
    high: int | None = None,
    taken: Collection[int] = (),
    block: Block = "engines",
) -> list[int]:
    """Return `count` distinct TCP ports that no process on this machine listens on.

    All are bound at the same time, which makes them distinct, and released when this returns: bind them soon.

    Args:
        count: how many ports are needed.
        low, high: the first and the last allowed port; None for the ports of `block`. `high` is used last.
        taken: ports that are already assigned to other users.
        block: what the ports are for.

    Raises:
        ClusterError: the range has fewer free ports.
    """
    ports: list[int] = []
    if low is None or high is None:
        low, high = block_range(block) or (None, None)
    with contextlib.ExitStack() as stack:
        for port in _candidates(count, low, high, taken):
            listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                listener.bind(("", port))
                listener.listen(1)
            except OSError:
                continue
            number = listener.getsockname()[1]
            if number not in taken:
                ports.append(number)
            if len(ports) == count:
                return ports
    where = "" if low is None else f" from {low} to {high}"
    raise ClusterError(
        f"{socket.gethostname()} has {len(ports)} free ports{where}, {count} are needed ({len(taken)} are already "
        "assigned). Set port_range_low and port_range_high to a larger range, or end the processes that listen there."
    )


def promised_ports(count: int, block: Block) -> list[int]:
    """Return `count` free ports of a block that this function returns to no other process while this one lives.

    For processes that listen on them much later. An abstract Unix socket stands for each promise.

    Raises:
        ClusterError: the block has fewer free ports.
    """
    ports: list[int] = []
    taken: set[int] = set()
    while len(ports) < count:
        [port] = free_ports(1, taken=taken, block=block)
        taken.add(port)
        promise = socket.socket(socket.AF_UNIX)
        try:
            promise.bind(f"\0nemo_rl-port-{port}")
        except OSError:  # promised to another process, or before in this one
            promise.close()
            continue
        _promises.append(promise)
        ports.append(port)
    return ports


def listen(host: str) -> socket.socket:
    """Return a socket that listens at `host` on a free port of the block of endpoints.

    Raises:
        ClusterError: the block has no free port.
        OSError: `host` is not an address of this machine.
    """
    low, high = block_range("endpoints") or (None, None)
    for port in _candidates(1, low, high, ()):
        try:
            return socket.create_server((host, port), backlog=128)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise ClusterError(f"{socket.gethostname()} has no free port from {low} to {high}: end processes that listen there")


def block_range(block: Block) -> tuple[int, int] | None:
    """Return the first and the last port of a block. None: the kernel gives almost all ports to client sockets."""
    band = _band(*_kernel_range())
    if band is None:
        return None
    blocks = get_args(Block)
    size = len(band) // len(blocks)
    first = band.start + blocks.index(block) * size
    return first, first + size - 1


def _band(kernel_first: int, kernel_last: int) -> range | None:
    """Return ports that the kernel gives to no client socket, if there are enough."""
    for window in _WINDOWS:
        below = range(window.start, min(window.stop, kernel_first))
        above = range(max(window.start, kernel_last + 1), window.stop)
        for band in (below, above):
            if len(band) >= _MIN_PORTS:
                return band
    return None


def _kernel_range() -> tuple[int, int]:
    """Return the first and the last port that the kernel gives to client sockets."""
    try:
        first, last = map(int, _KERNEL_RANGE.read_text().split())
    except (OSError, ValueError):
        return _IANA_RANGE
    return first, last


def _candidates(count: int, low: int | None, high: int | None, taken: Collection[int]) -> Iterable[int]:
    if low is None or high is None:
        return [0] * (2 * count + len(taken) + 16)
    # A random start keeps jobs that share a machine and a range from choosing the same ports.
    inner = [port for port in range(low, high) if port not in taken]
    # SystemRandom leaves the job's seeded generator untouched.
    start = random.SystemRandom().randrange(len(inner)) if inner else 0
    last = [] if high in taken else [high]
    return inner[start:] + inner[:start] + last
