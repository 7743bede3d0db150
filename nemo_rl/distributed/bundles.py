"""What each rank of a virtual cluster reserves, in rank order."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nemo_rl.distributed.cluster.nodes import natural_order


@dataclass(frozen=True)
class Bundle:
    """What one rank reserves.

    Attributes:
        node_idx: which of the job's nodes it is on.
        local_idx: its place among that node's bundles, ordered by GPU id.
        placement_group: the group that holds it.
        bundle_idx: its index in the group.
        node_id, address: the Ray node's id (hex) and IP address.
        gpu_id: as in `CUDA_VISIBLE_DEVICES`; None without GPUs.
    """

    node_idx: int
    local_idx: int
    placement_group: PlacementGroup
    bundle_idx: int
    node_id: str
    address: str
    gpu_id: str | None


def ordered_bundles(group: PlacementGroup, bundle_counts: list[int], use_gpus: bool) -> list[Bundle]:
    node_of = ray.util.placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    gpu_of = _gpu_ids(group, len(node_of)) if use_gpus else {}
    bundles: list[Bundle] = []
    first = 0
    for node_idx, count in enumerate(bundle_counts):
        indices = sorted(range(first, first + count), key=lambda index: (natural_order(gpu_of.get(index, "")), index))
        for local_idx, index in enumerate(indices):
            node_id = node_of[index]
            bundles.append(Bundle(node_idx, local_idx, group, index, node_id, addresses[node_id], gpu_of.get(index)))
        first += count
    return bundles


def _gpu_ids(group: PlacementGroup, count: int) -> dict[int, str]:
    """Which GPU Ray gave to each bundle: only a process inside the bundle can see it."""

    @ray.remote(num_cpus=0, num_gpus=0.01, max_retries=0)
    def visible_gpu() -> str:
        return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])

    return dict(
        enumerate(
            ray.get(
                [
                    visible_gpu.options(
                        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
                    ).remote()
                    for index in range(count)
                ]
            )
        )
    )
