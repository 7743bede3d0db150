"""Placement of a group's workers on the bundles of a virtual cluster. Plain arithmetic; does not import Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict

from nemo_rl.errors import ConfigError


class WorkerMetadata(TypedDict):
    """Describes one worker of a group.

    Keys:
        node_idx: index of the virtual cluster's node.
        local_rank: index among the group's workers on that node.
        global_rank: index among all the group's workers.
        name: the Ray actor's name.
        bundle_indices: (node_idx, local bundle indices) of the worker's tied group.
        dp_shard_idx: index on the axis "data_parallel", or else the index of its tied group.
    """

    node_idx: int
    local_rank: int
    global_rank: int
    name: str
    bundle_indices: tuple[int, list[int]]
    dp_shard_idx: int


@dataclass(frozen=True)
class WorkerPlacement:
    """The bundle and the ranks of one worker.

    Attributes:
        rank: global rank, the index in the group.
        node_idx: index of the virtual cluster's node.
        bundle: index into the cluster's bundles in rank order.
        local_rank: index among the group's workers on that node.
        tied_group: index of its tied group; in a group without ties, each worker is a tied group.
        is_leader: whether it is the first of its tied group.
        bundle_indices: the tied group as the user gave it.
    """

    rank: int
    node_idx: int
    bundle: int
    local_rank: int
    tied_group: int
    is_leader: bool
    bundle_indices: tuple[int, list[int]]


def place_workers(
    bundle_counts: Sequence[int],
    workers_per_node: int | Sequence[int] | None,
    bundle_indices_list: Sequence[tuple[int, Sequence[int]]] | None,
) -> list[WorkerPlacement]:
    """Place the workers of a group. Returns their placements in rank order.

    Args:
        bundle_counts: how many bundles each node has.
        workers_per_node: None for one worker per bundle; an int for that many on every node; or one int per node.
        bundle_indices_list: tied groups, each as `(node_idx, local bundle indices)`. Indices count the node's bundles
            and may continue into those of the following nodes, for a model that spans nodes.

    Raises:
        ConfigError: both options are given, or a node or bundle does not exist or is used twice.
    """
    if bundle_indices_list is not None and workers_per_node is not None:
        raise ConfigError("give either workers_per_node or bundle_indices_list, not both")
    if bundle_indices_list is None:
        counts = _worker_counts(bundle_counts, workers_per_node)
        bundle_indices_list = [(node, [index]) for node, count in enumerate(counts) for index in range(count)]
    first_bundle = [0, *accumulate(bundle_counts)]
    placements: list[WorkerPlacement] = []
    seen: set[int] = set()
    on_node = [0] * len(bundle_counts)
    for group, (node_idx, indices) in enumerate(bundle_indices_list):
        if not 0 <= node_idx < len(bundle_counts):
            raise ConfigError(
                f"bundle_indices_list[{group}] names node {node_idx}; there are {len(bundle_counts)} nodes"
            )
        if not indices:
            raise ConfigError(f"bundle_indices_list[{group}] names no bundles")
        for position, index in enumerate(indices):
            bundle = first_bundle[node_idx] + index
            if index < 0 or bundle >= first_bundle[-1]:
                raise ConfigError(
                    f"bundle_indices_list[{group}] names bundle {index} of node {node_idx}; the nodes have "
                    f"{list(bundle_counts)} bundles"
                )
            if bundle in seen:
                raise ConfigError(f"bundle_indices_list[{group}] names bundle {index} of node {node_idx} twice")
            seen.add(bundle)
            node = next(n for n in range(len(bundle_counts)) if bundle < first_bundle[n + 1])
            tied = (node_idx, list(indices))
            placements.append(WorkerPlacement(len(placements), node, bundle, on_node[node], group, position == 0, tied))
            on_node[node] += 1
    return placements


def _worker_counts(bundle_counts: Sequence[int], workers_per_node: int | Sequence[int] | None) -> list[int]:
    if workers_per_node is None:
        return list(bundle_counts)
    counts = [workers_per_node] * len(bundle_counts) if isinstance(workers_per_node, int) else list(workers_per_node)
    if len(counts) != len(bundle_counts):
        raise ConfigError(
            f"workers_per_node={workers_per_node!r} has {len(counts)} entries for {len(bundle_counts)} nodes"
        )
    for node, (count, available) in enumerate(zip(counts, bundle_counts)):
        if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= available:
            raise ConfigError(
                f"workers_per_node={workers_per_node!r} puts {count!r} workers on node {node}, which has {available} "
                "bundles"
            )
    return counts
