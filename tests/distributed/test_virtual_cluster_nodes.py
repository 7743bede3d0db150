"""Virtual clusters on several simulated nodes, in a cluster that may grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import ray
from ray.cluster_utils import Cluster

from nemo_rl.distributed.cluster.nodes import alive_nodes, ask_nodes, start_on_nodes
from nemo_rl.distributed.cluster.ports import free_ports_on_nodes
from nemo_rl.distributed.cluster.session import can_grow
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.errors import ClusterError, ResourceInsufficientError


@pytest.fixture(scope="module")
def cluster(start_nodes: Callable[..., Cluster]) -> Cluster:
    """Three nodes; the second has GPUs 0 to 3 (pretended)."""
    return start_nodes({"num_cpus": 2}, {"num_cpus": 4, "num_gpus": 4}, {"num_cpus": 2})


def _all_cpus_free() -> bool:
    return ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]


@pytest.fixture(autouse=True)
def nothing_reserved(cluster: Cluster) -> None:
    deadline = time.monotonic() + 60
    while not _all_cpus_free() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _all_cpus_free()


def test_the_drivers_own_node_comes_first(cluster: Cluster) -> None:
    nodes = alive_nodes()
    assert len(nodes) == 3
    assert nodes[0].node_id == ray.get_runtime_context().get_node_id()


def test_a_full_node_answers_for_itself_and_a_bad_one_spoils_no_other_answer() -> None:
    # Defined here, so that they are pickled with their code: workers do not find this module.
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
        virtual.bundles()  # every CPU is taken
        answers = ask_nodes(fails_on, nodes, nodes[1].node_id, timeout_s=60)
    assert [node for node, _ in answers] == nodes
    assert [answers[0][1], answers[2][1]] == ["found", "found"]
    assert isinstance(answers[1][1], LookupError)
    assert isinstance(answers[1][1], ray.exceptions.RayError)
    (silent,) = ask_nodes(node_id, nodes[:1], 60.0, timeout_s=0.1)
    assert isinstance(silent[1], ray.exceptions.GetTimeoutError)
    assert ask_nodes(node_id, [], timeout_s=1) == []


def test_each_node_of_the_job_is_one_node_of_its_own() -> None:
    with RayVirtualCluster([2, 2, 2], use_gpus=False) as virtual:
        bundles = virtual.bundles()
        by_node = [{bundle.node_id for bundle in bundles if bundle.node_idx == index} for index in range(3)]
        assert all(len(nodes) == 1 for nodes in by_node)
        assert len(set.union(*by_node)) == 3
        assert bundles[0].node_id == ray.get_runtime_context().get_node_id()


def test_spread_shares_a_node_only_when_it_must_and_strict_spread_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NRL_VIRTUAL_CLUSTER_MAX_RETRIES", "1")
    with RayVirtualCluster([2, 2, 2, 2], use_gpus=False) as virtual:
        assert len({bundle.node_id for bundle in virtual.bundles()}) == 3
    with pytest.raises(ResourceInsufficientError, match=r"STRICT_SPREAD\); the Ray cluster has 3 alive"):
        RayVirtualCluster([1] * 4, use_gpus=False, placement_group_strategy="STRICT_SPREAD").get_placement_groups()


def test_pack_uses_as_few_nodes_as_it_can() -> None:
    with RayVirtualCluster([2, 2], use_gpus=False, placement_group_strategy="PACK") as virtual:
        assert len({bundle.node_id for bundle in virtual.bundles()}) == 1


def test_gpu_bundles_find_the_node_with_gpus() -> None:
    with RayVirtualCluster([2, 2]) as virtual:
        assert len({bundle.node_id for bundle in virtual.bundles()}) == 1
        assert sorted(bundle.gpu_id for bundle in virtual.bundles() if bundle.gpu_id) == ["0", "1", "2", "3"]
        for index in range(2):
            ids = [bundle.gpu_id for bundle in virtual.bundles() if bundle.node_idx == index]
            assert ids == sorted(ids, key=str)


def test_ports_of_several_nodes_are_found_together() -> None:
    with RayVirtualCluster([2, 2, 2], use_gpus=False) as virtual:
        pairs = [(0, bundle.bundle_idx) for bundle in virtual.bundles()]
        found = virtual.get_available_addresses_and_ports_batch(pairs)
        assert [address for address, _ in found] == [bundle.address for bundle in virtual.bundles()]
        assert len(set(found)) == 6


def test_a_full_range_on_another_node_is_that_nodes_error() -> None:
    other = alive_nodes()[1]
    with pytest.raises(ClusterError, match="0 free ports from 1 to 1, 2 are needed"):
        free_ports_on_nodes({other.node_id: (2, 1, 1, {1})})


def test_a_request_that_is_too_large_waits_for_nodes_and_then_says_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert can_grow()
    monkeypatch.setenv("NRL_VIRTUAL_CLUSTER_MAX_RETRIES", "1")
    virtual = RayVirtualCluster([8], use_gpus=False, name="large")
    with pytest.raises(
        ResourceInsufficientError, match=r"'large'.*\[8\] bundles of 1 CPU.*3 alive node.*after 1 attempts"
    ):
        virtual.get_placement_groups()


def test_a_node_that_joins_serves_a_waiting_request(cluster: Cluster) -> None:
    virtual = RayVirtualCluster([6], use_gpus=False)
    waiting = threading.Thread(target=virtual.get_placement_groups)
    waiting.start()
    node = cluster.add_node(num_cpus=6)  # only the main thread may
    try:
        waiting.join(timeout=60)
        assert {bundle.node_id for bundle in virtual.bundles()} == {node.node_id}
    finally:
        virtual.shutdown()
        cluster.remove_node(node)
