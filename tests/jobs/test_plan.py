"""Tests how a plan assigns the nodes and venv builds of a job to the nodes of a cluster."""

from __future__ import annotations

from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.distributed.config import BundlesConfig
from nemo_rl.jobs.plan import NodeForecast, assign_nodes, assign_sources
from nemo_rl.jobs.venv_forecast import BUILT, READY, RECEIVED, VenvForecast


def nodes(**gpus: int) -> list[NodeResources]:
    resources = {name: {"CPU": 16.0, "GPU": float(count)} for name, count in gpus.items()}
    return [NodeResources(f"id-{name}", name, has, has) for name, has in resources.items()]


def test_nodes_are_assigned_to_free_nodes() -> None:
    plan = assign_nodes(nodes(a=8, b=8, c=4), {"policy": BundlesConfig(num_nodes=2, gpus_per_node=8)})
    assert (plan.addresses, plan.obstacle) == ({"policy": ["a", "b"]}, "")


CLUSTERS = {"policy": BundlesConfig(gpus_per_node=8), "generation": BundlesConfig(num_nodes=2, gpus_per_node=4)}


def test_generation_uses_remaining_nodes() -> None:
    plan = assign_nodes(nodes(a=8, b=4, c=4), CLUSTERS)
    assert (plan.addresses, plan.obstacle) == ({"policy": ["a"], "generation": ["b", "c"]}, "")


def test_obstacle_lists_free_resources() -> None:
    plan = assign_nodes(nodes(a=8, b=4), CLUSTERS)
    assert plan.addresses == {"policy": ["a"]}
    assert plan.obstacle == "the job needs 2 nodes with 4 GPUs each; free: a 0, b 4."
    assert "free: no node." in assign_nodes([], CLUSTERS).obstacle


def forecasts(**states: str) -> list[NodeForecast]:
    numbers = {"download_bytes": 10, "installed_bytes": 20, "seconds": 3.0}
    return [
        NodeForecast(name, [VenvForecast("v", "d" * 64, state, 1, **(numbers if state == BUILT else {}))])
        for name, state in states.items()
    ]


def test_missing_venv_is_built_once_and_broadcast() -> None:
    first, second = (node.venvs[0] for node in assign_sources(forecasts(a=BUILT, b=BUILT)))
    assert (first.state, first.download_bytes) == (BUILT, 10)
    assert (second.state, second.download_bytes, second.installed_bytes) == (RECEIVED, 0, 20)
    assert second.basis == "from a, which builds it in 3 s"


def test_existing_venv_is_broadcast_without_a_build() -> None:
    nodes = assign_sources(forecasts(a=BUILT, b=READY, c=BUILT))
    assert [node.venvs[0].state for node in nodes] == [RECEIVED, READY, RECEIVED]
    assert nodes[0].venvs[0].basis == "from b, which has it"
