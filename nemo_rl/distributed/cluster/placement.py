"""Which node of a Ray cluster serves which node of a job: plain arithmetic on what each node has, without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Strategy = Literal["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class NodeResources:
    """One alive Ray node.

    Attributes:
        node_id: Ray's id, in hex.
        address: the node's IP address.
        total, free: resource name -> amount.
    """

    node_id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def capacity(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many bundles fit into `resources`."""
    return min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items())


def plan(capacities: Sequence[int], bundle_counts: Sequence[int], strategy: str) -> list[int] | None:
    """Choose the Ray node of each node of the job.

    All bundles of one node of the job are on one Ray node. `SPREAD` gives every node of the job a Ray node of its own
    while there are any, `STRICT_SPREAD` always; `PACK` uses as few Ray nodes as it can, `STRICT_PACK` one.

    Args:
        capacities: how many bundles each Ray node can take, in order of preference.
        bundle_counts: how many bundles each node of the job needs.

    Returns:
        An index into `capacities` for each item of `bundle_counts`, or None if they do not fit. Equal needs on equal
        nodes keep their order.
    """
    left = list(capacities)
    if strategy == "STRICT_PACK":
        index = next((i for i, room in enumerate(left) if room >= sum(bundle_counts)), None)
        return None if index is None else [index] * len(bundle_counts)
    used: set[int] = set()
    chosen = [-1] * len(bundle_counts)
    # Largest first, each on the smallest node that takes it: finds distinct nodes whenever there are any.
    for item in sorted(range(len(bundle_counts)), key=lambda i: -bundle_counts[i]):
        fitting = [i for i, room in enumerate(left) if room >= bundle_counts[item]]
        fresh = [i for i in fitting if i not in used]
        again = [i for i in fitting if i in used]
        if strategy == "STRICT_SPREAD":
            candidates = fresh
        elif strategy == "SPREAD":
            candidates = fresh or again
        else:
            candidates = again or fresh
        if not candidates:
            return None
        # When packing, the roomiest fresh node leaves most for those that follow.
        sign = -1 if strategy == "PACK" else 1
        index = min(candidates, key=lambda i: (sign * left[i], i))
        used.add(index)
        left[index] -= bundle_counts[item]
        chosen[item] = index
    return chosen
