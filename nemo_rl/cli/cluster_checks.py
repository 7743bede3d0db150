"""Runs the checks of `nemo-rl doctor` on every node of a running cluster."""

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
    """Connect this process to the cluster at `address`, or at `RAY_ADDRESS`, during the block.

    Raises:
        ConfigError: neither names a cluster.
        ClusterError: the cluster cannot be joined.
    """
    address = address or settings.RAY_ADDRESS.get()
    if address in (None, "local"):
        raise ConfigError(
            "no cluster address: use --address HOST:PORT with the address of its head, or set RAY_ADDRESS."
        )
    with settings.exported({settings.RAY_ADDRESS.name: address}):
        init_ray()
        try:
            yield
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class NodeChecks:
    """Holds the checks of one node. Nodes may share an address: raylets of one host, or hosts behind one gateway."""

    node_id: str
    address: str
    checks: list[Check]

    @property
    def label(self) -> str:
        """Address and first digits of the node id, for display."""
        return f"{self.address} ({self.node_id[:_SHORT_ID]})"


def check_nodes() -> list[NodeChecks]:
    """Run the checks on every node of the connected cluster. A node that does not answer gets one fatal check."""
    nodes = alive_nodes()
    answers = ask_nodes(run_checks, nodes, timeout_s=_TIMEOUT_S)
    results = {node.node_id: NodeChecks(node.node_id, node.address, _checks(answer)) for node, answer in answers}
    asked = time.time()
    clocks = ask_nodes(_now, nodes, timeout_s=_TIMEOUT_S)
    answered = time.time()
    for node, node_time in clocks:
        if isinstance(node_time, float):
            results[node.node_id].checks.append(clock_check(node_time, asked, answered))
    return list(results.values())


def clock_check(node_time: float, asked: float, answered: float) -> Check:
    """Compare a node's clock with the driver's.

    Args:
        node_time: time on the node.
        asked, answered: times on the driver before and after the node read its clock.
    """
    offset = max(asked - node_time, node_time - answered, 0.0)
    if offset > MAX_CLOCK_OFFSET_S:
        return Check("clock of the driver", WARNING, f"differs by {offset:.0f} s", "synchronise clocks (NTP, chrony)")
    return Check("clock of the driver", OK, "agrees")


def _now() -> float:
    return time.time()


def _checks(answer: list[Check] | RayError) -> list[Check]:
    if not isinstance(answer, RayError):
        return answer
    why = str(answer).strip().rpartition("\n")[2]
    if isinstance(answer, GetTimeoutError):
        why = f"no answer within {_TIMEOUT_S:.0f} s"
    return [Check("node", FATAL, why, "read the logs of this node, and remove it from the cluster until it answers")]
