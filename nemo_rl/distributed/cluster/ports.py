"""Free TCP ports, of the machine this runs on and of the nodes of the Ray cluster."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Collection, Iterable

import ray

from nemo_rl.distributed.cluster.nodes import start_on_nodes
from nemo_rl.errors import ClusterError


def free_ports(count: int, low: int | None = None, high: int | None = None, taken: Collection[int] = ()) -> list[int]:
    """`count` distinct TCP ports that nobody on this machine listens on.

    All are bound at the same moment, so they are distinct; they are free again when this returns, so whoever wants one
    should bind it soon.

    Args:
        low, high: the first and the last port allowed; None for whatever the kernel offers. `high` itself is offered
            last.
        taken: ports that have been promised to others.

    Raises:
        ClusterError: there are fewer free ports in the range.
    """
    found: list[int] = []
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
                found.append(number)
            if len(found) == count:
                return found
    where = "" if low is None else f" from {low} to {high}"
    raise ClusterError(
        f"{socket.gethostname()} has {len(found)} free ports{where}, {count} are needed ({len(taken)} are promised "
        "already). Widen port_range_low and port_range_high, or end what listens there."
    )


def _candidates(count: int, low: int | None, high: int | None, taken: Collection[int]) -> Iterable[int]:
    if low is None or high is None:
        return [0] * (2 * count + len(taken) + 16)
    # A random start keeps jobs that share a machine and a range from choosing the same ports.
    inner = [port for port in range(low, high) if port not in taken]
    # It comes from the system: a job's own seeded generator must not notice.
    start = random.SystemRandom().randrange(len(inner)) if inner else 0
    last = [] if high in taken else [high]
    return inner[start:] + inner[:start] + last


def free_ports_on_nodes(
    wanted: dict[str, tuple[int, int | None, int | None, set[int]]],
) -> dict[str, list[int]]:
    """Run `free_ports` on each of the nodes (by id): in this process on the driver's own, in a task elsewhere."""
    here = ray.get_runtime_context().get_node_id()
    pending = start_on_nodes(free_ports, {node_id: own for node_id, own in wanted.items() if node_id != here})
    found = {node_id: free_ports(*own) for node_id, own in wanted.items() if node_id == here}
    for node_id, reference in pending.items():
        try:
            found[node_id] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ClusterError) else error from None
    return found
