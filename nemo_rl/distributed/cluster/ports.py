"""Free TCP ports of the machine that this process runs on."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Collection, Iterable

from nemo_rl.errors import ClusterError


def free_ports(count: int, low: int | None = None, high: int | None = None, taken: Collection[int] = ()) -> list[int]:
    """Return `count` distinct TCP ports that no process on this machine listens on.

    All are bound at the same time, which makes them distinct, and released when this returns: bind them soon.

    Args:
        count: how many ports are needed.
        low, high: the first and the last allowed port; None for ports that the kernel chooses. `high` is used last.
        taken: ports that are already assigned to other users.

    Raises:
        ClusterError: the range has fewer free ports.
    """
    ports: list[int] = []
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
        "assigned). Widen port_range_low and port_range_high, or end the processes that listen there."
    )


def _candidates(count: int, low: int | None, high: int | None, taken: Collection[int]) -> Iterable[int]:
    if low is None or high is None:
        return [0] * (2 * count + len(taken) + 16)
    # A random start keeps jobs that share a machine and a range from choosing the same ports.
    inner = [port for port in range(low, high) if port not in taken]
    # SystemRandom leaves the job's seeded generator untouched.
    start = random.SystemRandom().randrange(len(inner)) if inner else 0
    last = [] if high in taken else [high]
    return inner[start:] + inner[:start] + last
