"""Where a job would be on a cluster, from what its nodes have free."""

from __future__ import annotations

from nemo_rl.distributed.config import BundlesConfig, ClusterConfig
from nemo_rl.distributed.placement import NodeResources
from nemo_rl.jobs.plan import addresses_on


def nodes(**gpus: int) -> list[NodeResources]:
    resources = {name: {"CPU": 16.0, "GPU": float(count)} for name, count in gpus.items()}
    return [NodeResources(f"id-{name}", name, has, has) for name, has in resources.items()]


def test_the_nodes_of_a_job_are_spread_over_what_is_free() -> None:
    (policy, generation), obstacle = addresses_on(nodes(a=8, b=8, c=4), ClusterConfig(num_nodes=2, gpus_per_node=8))
    assert (list(policy), list(generation), obstacle) == (["a", "b"], [], "")


def test_generation_gets_what_the_policy_leaves() -> None:
    cluster = ClusterConfig(gpus_per_node=8, generation=BundlesConfig(num_nodes=2, gpus_per_node=4))
    (policy, generation), obstacle = addresses_on(nodes(a=8, b=4, c=4), cluster)
    assert (list(policy), list(generation), obstacle) == (["a"], ["b", "c"], "")


def test_what_is_missing_is_said_with_what_is_free() -> None:
    cluster = ClusterConfig(gpus_per_node=8, generation=BundlesConfig(num_nodes=2, gpus_per_node=4))
    (policy, generation), obstacle = addresses_on(nodes(a=8, b=4), cluster)
    assert (list(policy), list(generation)) == (["a"], [])
    assert obstacle == "2 nodes with 4 GPUs each are asked for; free: a 0, b 4."
    assert "free: no node." in addresses_on([], cluster)[1]
