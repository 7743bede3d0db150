"""Call a function on nodes of the Ray cluster. Nodes that lack the driver's source receive it first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from nemo_rl.distributed.cluster.node_calls import call_on_nodes, collect_answers
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.distributed.cluster.ports import Block, free_ports
from nemo_rl.distributed.provisioning.source_sync import distribute_source, task_options
from nemo_rl.errors import ClusterError

T = TypeVar("T")


def start_on_nodes(function: Callable[..., T], arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, ray.ObjectRef[T]]:
    """Call a function once on each of several nodes, in parallel, as `call_on_nodes` does.

    Args:
        arguments: node id -> arguments of the call on that node.

    Returns:
        Node id -> future result.

    Raises:
        BroadcastError: a node cannot receive the driver's source.
    """
    distribute_source([node for node in alive_nodes() if node.node_id in arguments])
    return call_on_nodes(function, arguments, task_options)


def ask_nodes(
    function: Callable[..., T], nodes: Iterable[NodeResources], *arguments: Any, timeout_s: float
) -> list[tuple[NodeResources, T | RayError]]:
    """Call a function once on each of `nodes` and wait for all results, at most `timeout_s` seconds in total.

    Returns:
        Each node with its result or error: the exception of the function, or `GetTimeoutError`.
    """
    nodes = list(nodes)
    calls = start_on_nodes(function, {node.node_id: arguments for node in nodes})
    results = collect_answers(calls, timeout_s)
    return [(node, results[node.node_id]) for node in nodes]


def free_ports_on_nodes(
    wanted: dict[str, tuple[int, int | None, int | None, set[int]]], block: Block = "engines"
) -> dict[str, list[int]]:
    """Find free ports on several nodes: in this process on the driver's node, in a Ray task on other nodes.

    Args:
        wanted: node id -> arguments of `free_ports` but the last.
        block: its last argument.

    Returns:
        Node id -> ports.

    Raises:
        ClusterError: a node has fewer free ports than requested.
    """
    driver_node = ray.get_runtime_context().get_node_id()
    remote = {node_id: (*arguments, block) for node_id, arguments in wanted.items() if node_id != driver_node}
    pending = start_on_nodes(free_ports, remote)
    ports = {node_id: free_ports(*arguments, block) for node_id, arguments in wanted.items() if node_id == driver_node}
    for node_id, reference in pending.items():
        try:
            ports[node_id] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ClusterError) else error from None
    return ports
