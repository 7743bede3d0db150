"""The checks of `nemo-rl doctor`, on every node of a running cluster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, RayError

from nemo_rl import settings
from nemo_rl.cli.checks import FATAL, MAX_CLOCK_OFFSET_S, OK, WARNING, Check, run_checks
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.cluster.session import init_ray
from nemo_rl.distributed.provisioning.remote_calls import ask_nodes
from nemo_rl.errors import ConfigError

_TIMEOUT_S = 120.0
_SHORT_ID = 8


@contextlib.contextmanager
def joined_cluster(address: str | None = None) -> Iterator[None]:
    """While the block runs, this process is connected to the running cluster at `address`, else of `RAY_ADDRESS`.

    Raises:
        ConfigError: neither names a cluster.
        ClusterError: it cannot be joined.
    """
    address = address or settings.RAY_ADDRESS.get()
    if address in (None, "local"):
        raise ConfigError("which cluster? Give --address HOST:PORT of its head, or set RAY_ADDRESS.")
    with settings.exported({settings.RAY_ADDRESS.name: address}):
        init_ray()
        try:
            yield
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class NodeChecks:
    """What was found on one node. Several nodes may have one address: raylets of one host, hosts behind one gateway."""

    node_id: str
    address: str
    checks: list[Check]

    @property
    def label(self) -> str:
        """For people: the address and the first digits of the id."""
        return f"{self.address} ({self.node_id[:_SHORT_ID]})"


def check_nodes() -> list[NodeChecks]:
    """The checks of every node of the cluster that was joined. A node that does not answer has one fatal finding."""
    nodes = alive_nodes()
    answers = ask_nodes(run_checks, nodes, timeout_s=_TIMEOUT_S)
    found = {node.node_id: NodeChecks(node.node_id, node.address, _checks(answer)) for node, answer in answers}
    asked = time.time()
    clocks = ask_nodes(_now, nodes, timeout_s=_TIMEOUT_S)
    answered = time.time()
    for node, there in clocks:
        if isinstance(there, float):
            found[node.node_id].checks.append(clock_check(there, asked, answered))
    return list(found.values())


def clock_check(there: float, asked: float, answered: float) -> Check:
    """A node's clock against the driver's, which said `asked` before and `answered` after the node said `there`."""
    offset = max(asked - there, there - answered, 0.0)
    if offset > MAX_CLOCK_OFFSET_S:
        return Check("clock of the driver", WARNING, f"{offset:.0f} s away from it", "synchronise clocks (NTP, chrony)")
    return Check("clock of the driver", OK, "agrees with it")


def _now() -> float:
    return time.time()


def _checks(answer: list[Check] | RayError) -> list[Check]:
    if not isinstance(answer, RayError):
        return answer
    why = str(answer).strip().rpartition("\n")[2]
    if isinstance(answer, GetTimeoutError):
        why = f"no answer within {_TIMEOUT_S:.0f} s"
    return [Check("node", FATAL, why, "see this node's logs; take it out of the cluster until it answers")]
