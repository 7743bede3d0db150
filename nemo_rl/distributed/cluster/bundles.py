"""The bundles that a virtual cluster has reserved, in rank order."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nemo_rl.distributed.cluster.placement import natural_order


@dataclass(frozen=True)
class Bundle:
    """The reserved resources of one rank.

    Attributes:
        node_idx: index of the job's node that holds the bundle.
        local_idx: index among that node's bundles, ordered by GPU id.
        placement_group: the placement group that the bundle belongs to.
        bundle_idx: its index in the placement group.
        node_id, address: the Ray node's id (hex) and IP address.
        gpu_id: as in `CUDA_VISIBLE_DEVICES`; None for a bundle without a GPU.
    """

    node_idx: int
    local_idx: int
    placement_group: PlacementGroup
    bundle_idx: int
    node_id: str
    address: str
    gpu_id: str | None


def ordered_bundles(group: PlacementGroup, bundle_counts: list[int], use_gpus: bool) -> list[Bundle]:
    """Return the bundles of a placement group in rank order: by node, then by GPU id.

    Args:
        group: its bundles are ordered by node of the job.
        bundle_counts: the number of bundles of each node of the job.
        use_gpus: whether each bundle has a GPU.
    """
    node_ids = ray.util.placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    gpu_ids = _gpu_ids(group, len(node_ids)) if use_gpus else {}
    bundles: list[Bundle] = []
    first = 0
    for node_idx, count in enumerate(bundle_counts):
        indices = sorted(range(first, first + count), key=lambda index: (natural_order(gpu_ids.get(index, "")), index))
        for local_idx, index in enumerate(indices):
            node_id = node_ids[index]
            bundles.append(Bundle(node_idx, local_idx, group, index, node_id, addresses[node_id], gpu_ids.get(index)))
        first += count
    return bundles


def _gpu_ids(group: PlacementGroup, count: int) -> dict[int, str]:
    """Return the GPU id of each bundle. Only a process inside a bundle can see it, so this runs a task in each."""

    @ray.remote(num_cpus=0, num_gpus=0.01, max_retries=0)
    def visible_gpu() -> str:
        return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])

    strategies = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in range(count)]
    return dict(enumerate(ray.get([visible_gpu.options(scheduling_strategy=one).remote() for one in strategies])))
