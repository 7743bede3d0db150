"""Where a job would be on a cluster, from what its nodes have free."""

from __future__ import annotations

from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.distributed.config import BundlesConfig, ClusterConfig
from nemo_rl.jobs.plan import NodeForecast, addresses_on, with_sources
from nemo_rl.jobs.venv_forecast import BUILT, READY, RECEIVED, VenvForecast


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


def forecasts(**states: str) -> list[NodeForecast]:
    numbers = {"download_bytes": 10, "installed_bytes": 20, "seconds": 3.0}
    return [
        NodeForecast(name, [VenvForecast("v", "d" * 64, state, 1, **(numbers if state == BUILT else {}))])
        for name, state in states.items()
    ]


def test_a_venv_that_nobody_has_is_built_on_one_node_and_comes_to_the_others_from_there() -> None:
    first, second = (node.venvs[0] for node in with_sources(forecasts(a=BUILT, b=BUILT)))
    assert (first.state, first.download_bytes) == (BUILT, 10)
    assert (second.state, second.download_bytes, second.installed_bytes) == (RECEIVED, 0, 20)
    assert second.basis == "from a, which builds it in 3 s"


def test_a_venv_that_a_node_has_is_built_nowhere() -> None:
    nodes = with_sources(forecasts(a=BUILT, b=READY, c=BUILT))
    assert [node.venvs[0].state for node in nodes] == [RECEIVED, READY, RECEIVED]
    assert nodes[0].venvs[0].basis == "from b, which has it"
