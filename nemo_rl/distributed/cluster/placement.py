"""Assignment of a job's nodes to Ray nodes by the resources of each. Plain arithmetic; does not import Ray."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Strategy = Literal["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class NodeResources:
    """One alive Ray node.

    Attributes:
        node_id: Ray's node id, in hex.
        address: the node's IP address.
        total, free: resource name -> amount.
    """

    node_id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def natural_order(text: str) -> list[tuple[int, int | str]]:
    """Return a sort key under which `10.0.0.9` comes before `10.0.0.10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]


def capacity(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Return how many bundles fit into `resources`."""
    return min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items())


def plan(capacities: Sequence[int], bundle_counts: Sequence[int], strategy: str) -> list[int] | None:
    """Choose the Ray node for each node of the job.

    All bundles of one node of the job are placed on one Ray node. `SPREAD` puts the job's nodes on different Ray nodes
    while there are enough, `STRICT_SPREAD` always; `PACK` uses as few Ray nodes as possible, `STRICT_PACK` exactly one.

    Args:
        capacities: how many bundles each Ray node can hold, in order of preference.
        bundle_counts: how many bundles each node of the job needs.

    Returns:
        An index into `capacities` for each item of `bundle_counts`, or None if they do not fit. Nodes of the job with
        equal needs keep their order on Ray nodes of equal capacity.
    """
    remaining = list(capacities)
    if strategy == "STRICT_PACK":
        index = next((i for i, room in enumerate(remaining) if room >= sum(bundle_counts)), None)
        return None if index is None else [index] * len(bundle_counts)
    used: set[int] = set()
    chosen = [-1] * len(bundle_counts)
    # The largest first, each on the smallest node that can hold it: this finds distinct nodes whenever they exist.
    for item in sorted(range(len(bundle_counts)), key=lambda i: -bundle_counts[i]):
        fitting = [i for i, room in enumerate(remaining) if room >= bundle_counts[item]]
        unused = [i for i in fitting if i not in used]
        reused = [i for i in fitting if i in used]
        if strategy == "STRICT_SPREAD":
            candidates = unused
        elif strategy == "SPREAD":
            candidates = unused or reused
        else:
            candidates = reused or unused
        if not candidates:
            return None
        # When packing, the unused node with the most room leaves the most for later items.
        sign = -1 if strategy == "PACK" else 1
        index = min(candidates, key=lambda i: (sign * remaining[i], i))
        used.add(index)
        remaining[index] -= bundle_counts[item]
        chosen[item] = index
    return chosen
