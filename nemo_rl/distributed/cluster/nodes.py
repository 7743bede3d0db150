"""The nodes of the Ray cluster that this process is connected to, and calls on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from nemo_rl.distributed.cluster.node_calls import call_on_nodes, collect_answers
from nemo_rl.distributed.cluster.placement import NodeResources, natural_order
from nemo_rl.distributed.provisioning.source_sync import bring_source, task_options
from nemo_rl.distributed.ray_private import available_resources

T = TypeVar("T")


def alive_nodes() -> list[NodeResources]:
    """Return the alive Ray nodes: the driver's node first, then by IP address and id."""
    driver_node_id = ray.get_runtime_context().get_node_id()
    free = available_resources()
    nodes = [
        NodeResources(node["NodeID"], node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.node_id != driver_node_id, natural_order(node.address), node.node_id))


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
