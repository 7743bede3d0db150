"""Which worker of a group sits on which bundle of the virtual cluster. Pure arithmetic; no Ray here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict

from nemo_rl.errors import ConfigError


class WorkerMetadata(TypedDict):
    """What is known about one worker of a group.

    Keys:
        node_idx: the virtual cluster's node.
        local_rank: index among the group's workers on that node.
        global_rank: index among all the group's workers.
        name: of the Ray actor.
        bundle_indices: (node_idx, local bundle indices) of the worker's tied group.
        dp_shard_idx: its index on the axis "data_parallel", or else its tied group.
    """

    node_idx: int
    local_rank: int
    global_rank: int
    name: str
    bundle_indices: tuple[int, list[int]]
    dp_shard_idx: int


@dataclass(frozen=True)
class Seat:
    """One worker's place.

    Attributes:
        rank: global rank: its index in the group.
        node_idx: the virtual cluster's node.
        bundle: index into the cluster's bundles in rank order.
        local_rank: index among the group's workers on that node.
        tied_group: index of its tied group; every worker of a group without ties is one of its own.
        is_leader: first of its tied group.
        bundle_indices: the tied group as the user gave it.
    """

    rank: int
    node_idx: int
    bundle: int
    local_rank: int
    tied_group: int
    is_leader: bool
    bundle_indices: tuple[int, list[int]]


def plan_seats(
    bundle_counts: Sequence[int],
    workers_per_node: int | Sequence[int] | None,
    bundle_indices_list: Sequence[tuple[int, Sequence[int]]] | None,
) -> list[Seat]:
    """The seats of a worker group in rank order.

    Args:
        bundle_counts: how many bundles each node has.
        workers_per_node: None for one worker per bundle; an int for that many on every node; or one int per node.
        bundle_indices_list: tied groups, `(node_idx, local bundle indices)` each. Indices count the node's bundles;
            they may go on into the bundles of the following nodes, for a model that spans nodes.

    Raises:
        ConfigError: both are given, or a node or bundle does not exist or is used twice.
    """
    if bundle_indices_list is not None and workers_per_node is not None:
        raise ConfigError("give either workers_per_node or bundle_indices_list, not both")
    if bundle_indices_list is None:
        counts = _worker_counts(bundle_counts, workers_per_node)
        bundle_indices_list = [(node, [index]) for node, count in enumerate(counts) for index in range(count)]
    first_bundle = [0, *accumulate(bundle_counts)]
    seats: list[Seat] = []
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
                raise ConfigError(f"bundle_indices_list[{group}] names bundle {index} of node {node_idx} a second time")
            seen.add(bundle)
            node = next(n for n in range(len(bundle_counts)) if bundle < first_bundle[n + 1])
            tied = (node_idx, list(indices))
            seats.append(Seat(len(seats), node, bundle, on_node[node], group, position == 0, tied))
            on_node[node] += 1
    return seats


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
