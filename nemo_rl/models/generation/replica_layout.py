"""Where the replicas of a model run, and which prompts each gets. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_rl.errors import ConfigError


def replica_bundles(bundle_counts: Sequence[int], num_workers: int | None, size: int) -> list[tuple[int, list[int]]]:
    """Node and local bundles of every replica, for `RayWorkerGroup`; a replica of `size` workers stays on its node.

    Raises:
        ConfigError: the workers do not make whole replicas, or there are more than the bundles allow.
    """
    counts = _replicas_per_node(bundle_counts, num_workers, size)
    return [
        (node, list(range(index * size, (index + 1) * size)))
        for node, count in enumerate(counts)
        for index in range(count)
    ]


def _replicas_per_node(bundle_counts: Sequence[int], num_workers: int | None, size: int) -> list[int]:
    """How many replicas each node gets: all it has room for, or those of `num_workers` spread as evenly as it goes."""
    limits = [count // size for count in bundle_counts]
    uneven = num_workers % size if num_workers is not None else any(count % size for count in bundle_counts)
    if uneven:
        what = (
            f"policy.generation.num_workers={num_workers}"
            if num_workers
            else f"the places for generation workers, {list(bundle_counts)} per node,"
        )
        raise ConfigError(
            f"{what} cannot be divided into replicas of {size} workers (policy.generation.options): change one of "
            "them, or the workers per node (cluster.gpus_per_node or cluster.cpu_workers_per_node)"
        )
    if num_workers is None:
        return limits
    if num_workers > sum(limits) * size:
        raise ConfigError(
            f"policy.generation.num_workers={num_workers}, but the cluster has only {sum(limits) * size} places "
            f"({[limit * size for limit in limits]} per node); lower it, or raise cluster.cpu_workers_per_node or "
            "cluster.num_nodes"
        )
    counts = [0] * len(bundle_counts)
    for _ in range(num_workers // size):
        free = [node for node, limit in enumerate(limits) if counts[node] < limit]
        counts[min(free, key=lambda node: counts[node])] += 1
    return counts


def even_parts(total: int, num_parts: int) -> list[tuple[int, int]]:
    """Consecutive (start, end) of almost equal sizes; empty ones at the end where there are more parts than items."""
    small, extra = divmod(total, num_parts)
    bounds, start = [], 0
    for part in range(num_parts):
        end = start + small + (part < extra)
        bounds.append((start, end))
        start = end
    return bounds
