"""Divides the bundles of the nodes into replicas of the generation engine.

The module imports neither Ray nor torch: a job checks its layout before it imports them.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_rl.errors import ConfigError


def replica_bundles(bundle_counts: Sequence[int], num_workers: int | None, size: int) -> list[tuple[int, list[int]]]:
    """Return the node and local bundles of every replica, for `RayWorkerGroup`. A replica stays on one node.

    Args:
        bundle_counts: Bundles of each node.
        num_workers: Workers over all nodes. None: one per bundle.
        size: Workers of one replica.

    Raises:
        ConfigError: The workers cannot be divided into replicas, or outnumber the bundles.
    """
    counts = _replicas_per_node(bundle_counts, num_workers, size)
    return [
        (node, list(range(index * size, (index + 1) * size)))
        for node, count in enumerate(counts)
        for index in range(count)
    ]


def _replicas_per_node(bundle_counts: Sequence[int], num_workers: int | None, size: int) -> list[int]:
    """Return the number of replicas per node: as many as fit, or `num_workers` distributed as evenly as possible."""
    limits = [count // size for count in bundle_counts]
    indivisible = num_workers % size if num_workers is not None else any(count % size for count in bundle_counts)
    if indivisible:
        what = (
            f"policy.generation.num_workers={num_workers}"
            if num_workers
            else f"the workers that fit on the nodes, {list(bundle_counts)} per node,"
        )
        raise ConfigError(
            f"{what} cannot be divided into replicas of {size} workers (policy.generation.options): change one of "
            "them, or the workers per node (cluster.gpus_per_node or cluster.cpu_workers_per_node)"
        )
    if num_workers is None:
        return limits
    if num_workers > sum(limits) * size:
        raise ConfigError(
            f"policy.generation.num_workers={num_workers}, but only {sum(limits) * size} workers fit "
            f"({[limit * size for limit in limits]} per node); lower it, or raise cluster.cpu_workers_per_node or "
            "cluster.num_nodes"
        )
    counts = [0] * len(bundle_counts)
    for _ in range(num_workers // size):
        free = [node for node, limit in enumerate(limits) if counts[node] < limit]
        counts[min(free, key=lambda node: counts[node])] += 1
    return counts
