"""The nodes of the Ray cluster that this process is connected to."""

from __future__ import annotations

import ray

from nemo_rl.distributed.cluster.placement import NodeResources, natural_order
from nemo_rl.distributed.ray_private import available_resources


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


def worker_nodes() -> list[NodeResources]:
    """Return the alive nodes that can run workers, in the same order. The others have neither CPUs nor GPUs."""
    return [node for node in alive_nodes() if node.total.get("CPU", 0) > 0 or node.total.get("GPU", 0) > 0]
