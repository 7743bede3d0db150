"""Chooses the transport of weights between the clusters of a job, and checks the configured one before they exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl.errors import ConfigError, WeightSyncError

if TYPE_CHECKING:
    from nemo_rl.algorithms.config import OnPolicyJobConfig
    from nemo_rl.distributed.config import BundlesConfig
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.weights.routes import Place, Route


def check_weight_route(config: OnPolicyJobConfig) -> None:
    """Raise `ConfigError` for a `policy.weight_transport` that is unknown or cannot reach all workers.

    The nodes are not known yet, so the check assumes that policy, generation and driver share nodes.
    """
    transport, cluster = config.policy.weight_transport, config.cluster
    if transport == "auto":
        return
    from nemo_rl.models.weights.routes import choose_route  # imports torch

    policy = _planned_places(cluster, "policy")
    generation = policy if cluster.generation is None else _planned_places(cluster.generation, "generation")
    try:
        choose_route(transport, policy=policy, generation=generation, driver_node_id=policy[0].node_id)
    except WeightSyncError as error:
        raise ConfigError(f"policy.weight_transport: {error}") from error


def route_between(senders: RayVirtualCluster | None, receivers: RayVirtualCluster, transport: str = "auto") -> Route:
    """Choose the route between the workers of two clusters, which are reserved if need be.

    Args:
        senders: cluster of the policy; None if this process sends.
        receivers: cluster of generation workers.
        transport: `policy.weight_transport`.

    Raises:
        ConfigError, WeightSyncError: see `choose_route`.
    """
    import ray

    from nemo_rl.models.weights.routes import Place, choose_route

    node = ray.get_runtime_context().get_node_id()
    policy = [Place(node)] if senders is None else [Place.of(bundle) for bundle in senders.bundles()]
    generation = [Place.of(bundle) for bundle in receivers.bundles()]
    return choose_route(transport, policy=policy, generation=generation, driver_node_id=node)


def _planned_places(part: BundlesConfig, owner: str) -> list[Place]:
    from nemo_rl.models.weights.routes import Place

    return [
        Place(f"node {node}", f"{owner} {index}" if part.use_gpus else None)
        for node in range(part.num_nodes)
        for index in range(part.workers_per_node)
    ]
