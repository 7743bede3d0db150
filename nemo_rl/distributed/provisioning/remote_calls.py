"""Call a function on nodes of the Ray cluster. Nodes that lack the driver's source receive it first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from nemo_rl.distributed.cluster.node_calls import call_on_nodes, collect_answers
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.distributed.cluster.ports import free_ports
from nemo_rl.distributed.provisioning.source_sync import bring_source, task_options
from nemo_rl.errors import ClusterError

T = TypeVar("T")


def start_on_nodes(function: Callable[..., T], arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, ray.ObjectRef[T]]:
    """Call a function once on each of some nodes, at the same time.

    As `call_on_nodes`; a node that lacks this package's source gets it first, see `project_source`.

    Args:
        arguments: of the call on each node, by node id.

    Returns:
        The results to come, by node id.
    """
    bring_source([node for node in alive_nodes() if node.node_id in arguments])
    return call_on_nodes(function, arguments, task_options)


def ask_nodes(
    function: Callable[..., T], nodes: Iterable[NodeResources], *arguments: Any, timeout_s: float
) -> list[tuple[NodeResources, T | RayError]]:
    """Call a function once on each of `nodes` and wait for all of them together, at most `timeout_s` seconds.

    Returns:
        Each node with its answer, or with why there is none: what the function raised, or `GetTimeoutError`.
    """
    asked = list(nodes)
    calls = start_on_nodes(function, {node.node_id: arguments for node in asked})
    answers = collect_answers(calls, timeout_s)
    return [(node, answers[node.node_id]) for node in asked]


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
