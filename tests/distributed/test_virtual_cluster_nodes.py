"""Virtual clusters on several simulated nodes, in a cluster that can grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import ray
from ray.cluster_utils import Cluster

from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.cluster.session import can_grow
from nemo_rl.distributed.provisioning.remote_calls import ask_nodes, free_ports_on_nodes, start_on_nodes
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.errors import ClusterError, ResourceInsufficientError

pytestmark = pytest.mark.slow  # starts three nodes


@pytest.fixture(scope="module")
def cluster(start_nodes: Callable[..., Cluster]) -> Cluster:
    """Start three nodes; the second has simulated GPUs 0 to 3."""
    return start_nodes({"num_cpus": 2}, {"num_cpus": 4, "num_gpus": 4}, {"num_cpus": 2})


def _all_cpus_free() -> bool:
    return ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]


@pytest.fixture(autouse=True)
def nothing_reserved(cluster: Cluster) -> None:
    deadline = time.monotonic() + 600
    while not _all_cpus_free() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _all_cpus_free()


def test_driver_node_comes_first(cluster: Cluster) -> None:
    nodes = alive_nodes()
    assert len(nodes) == 3
    assert nodes[0].node_id == ray.get_runtime_context().get_node_id()


def test_each_node_answers_even_if_full_or_next_to_a_failure() -> None:
    # Local functions are pickled with their code; workers cannot import this module.
    def node_id(seconds: float = 0.0) -> str:
        time.sleep(seconds)
        return ray.get_runtime_context().get_node_id()

    def fails_on(bad: str) -> str:
        if node_id() == bad:
            raise LookupError("no such program")
        return "found"

    nodes = alive_nodes()
    references = start_on_nodes(node_id, {node.node_id: (0.0,) for node in nodes})
    assert {key: ray.get(reference) for key, reference in references.items()} == {key: key for key in references}
    with RayVirtualCluster([2, 4, 2], use_gpus=False) as virtual:
        virtual.bundles()  # reserves every CPU
        answers = ask_nodes(fails_on, nodes, nodes[1].node_id, timeout_s=60)
    assert [node for node, _ in answers] == nodes
    assert [answers[0][1], answers[2][1]] == ["found", "found"]
    assert isinstance(answers[1][1], LookupError)
    assert isinstance(answers[1][1], ray.exceptions.RayError)
    (late,) = ask_nodes(node_id, nodes[:1], 60.0, timeout_s=0.1)
    assert isinstance(late[1], ray.exceptions.GetTimeoutError)
    assert ask_nodes(node_id, [], timeout_s=1) == []


def test_each_node_of_the_job_gets_a_separate_node() -> None:
    with RayVirtualCluster([2, 2, 2], use_gpus=False) as virtual:
        bundles = virtual.bundles()
        by_node = [{bundle.node_id for bundle in bundles if bundle.node_idx == index} for index in range(3)]
        assert all(len(nodes) == 1 for nodes in by_node)
        assert len(set.union(*by_node)) == 3
        assert bundles[0].node_id == ray.get_runtime_context().get_node_id()


def test_spread_shares_nodes_if_necessary_strict_spread_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NRL_VIRTUAL_CLUSTER_MAX_RETRIES", "1")
    with RayVirtualCluster([2, 2, 2, 2], use_gpus=False) as virtual:
        assert len({bundle.node_id for bundle in virtual.bundles()}) == 3
    with pytest.raises(ResourceInsufficientError, match=r"STRICT_SPREAD\); the Ray cluster has 3 alive"):
        RayVirtualCluster([1] * 4, use_gpus=False, placement_group_strategy="STRICT_SPREAD").get_placement_groups()


def test_pack_uses_as_few_nodes_as_possible() -> None:
    with RayVirtualCluster([2, 2], use_gpus=False, placement_group_strategy="PACK") as virtual:
        assert len({bundle.node_id for bundle in virtual.bundles()}) == 1


def test_gpu_bundles_are_on_the_node_with_gpus() -> None:
    with RayVirtualCluster([2, 2]) as virtual:
        assert len({bundle.node_id for bundle in virtual.bundles()}) == 1
        assert sorted(bundle.gpu_id for bundle in virtual.bundles() if bundle.gpu_id) == ["0", "1", "2", "3"]
        for index in range(2):
            ids = [bundle.gpu_id for bundle in virtual.bundles() if bundle.node_idx == index]
            assert ids == sorted(ids, key=str)


def test_ports_of_several_nodes() -> None:
    with RayVirtualCluster([2, 2, 2], use_gpus=False) as virtual:
        pairs = [(0, bundle.bundle_idx) for bundle in virtual.bundles()]
        addresses = virtual.get_available_addresses_and_ports_batch(pairs)
        assert [address for address, _ in addresses] == [bundle.address for bundle in virtual.bundles()]
        assert len(set(addresses)) == 6


def test_range_without_free_ports_on_another_node() -> None:
    other = alive_nodes()[1]
    with pytest.raises(ClusterError, match="0 free ports from 1 to 1, 2 are needed"):
        free_ports_on_nodes({other.node_id: (2, 1, 1, {1})})


def test_too_large_request_waits_then_reports_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_grow()
    monkeypatch.setenv("NRL_VIRTUAL_CLUSTER_MAX_RETRIES", "1")
    virtual = RayVirtualCluster([8], use_gpus=False, name="large")
    with pytest.raises(
        ResourceInsufficientError, match=r"'large'.*\[8\] bundles of 1 CPU.*3 alive node.*after 1 attempts"
    ):
        virtual.get_placement_groups()


def test_joining_node_serves_a_waiting_request(cluster: Cluster) -> None:
    virtual = RayVirtualCluster([6], use_gpus=False)
    waiting = threading.Thread(target=virtual.get_placement_groups)
    waiting.start()
    node = cluster.add_node(num_cpus=6)  # Ray allows this only in the main thread
    try:
        waiting.join(timeout=400)
        assert {bundle.node_id for bundle in virtual.bundles()} == {node.node_id}
    finally:
        virtual.shutdown()
        cluster.remove_node(node)
