"""The nodes of the Ray cluster that this process is connected to."""

from __future__ import annotations

import re

import ray

from nemo_rl.distributed.placement import NodeResources


def alive_nodes() -> list[NodeResources]:
    """The Ray nodes that are alive: the driver's own first, then by IP address and id."""
    here = ray.get_runtime_context().get_node_id()
    free = ray._private.state.available_resources_per_node()
    nodes = [
        NodeResources(node["NodeID"], node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.node_id != here, natural_order(node.address), node.node_id))


def natural_order(text: str) -> list[tuple[int, int | str]]:
    """A sort key under which `10.0.0.9` comes before `10.0.0.10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]
