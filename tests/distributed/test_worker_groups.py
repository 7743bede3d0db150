"""Worker groups on a real local Ray cluster, in real additive venvs on top of this interpreter."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from processes import running

from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup, make_actor_runtime_env
from nemo_rl.errors import ConfigError, ResourceInsufficientError, UnregisteredActorError, WorkerError, WorkerStartError

SOURCES = Path(__file__).with_name("worker_sources")
PROBE = "sample_workers.Probe"
OLD = {"uv": ["packaging==23.2"]}

pytestmark = pytest.mark.usefixtures("ray_local", "worker_store")


@pytest.fixture(scope="module")
def worker_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_RL_VENV_DIR", str(tmp_path_factory.mktemp("venvs")))
        patch.setenv("NEMO_RL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        for name in ("Probe", "Configured", "DiesInConstructor"):
            patch.setitem(ACTOR_ENVIRONMENT_REGISTRY, f"sample_workers.{name}", sys.executable)
        yield


@pytest.fixture(scope="module")
def cluster(ray_local: str) -> Iterator[RayVirtualCluster]:
    """Reserve four CPU bundles, each shared by up to four groups."""
    with RayVirtualCluster([4], use_gpus=False, max_colocated_worker_groups=4) as virtual_cluster:
        yield virtual_cluster


def builder(fqn: str, *args: Any, **kwargs: Any) -> RayWorkerBuilder:
    runtime_env = dict(kwargs.pop("runtime_env", {}))
    runtime_env["env_vars"] = {"PYTHONPATH": str(SOURCES), **runtime_env.get("env_vars", {})}
    return RayWorkerBuilder(fqn, *args, runtime_env=runtime_env, **kwargs)


@pytest.fixture(scope="module")
def group(cluster: RayVirtualCluster) -> Iterator[RayWorkerGroup]:
    """Start four workers as 2 (data_parallel) x 2 (tensor_parallel)."""
    sharding = NamedSharding([[0, 1], [2, 3]], ["data_parallel", "tensor_parallel"])
    group = RayWorkerGroup(cluster, builder(PROBE, runtime_env=OLD), name_prefix="probe", sharding_annotations=sharding)
    yield group
    assert group.shutdown()


def call(group: RayWorkerGroup, method: str, **kwargs: Any) -> list[Any]:
    return group.get_all_worker_results(group.run_all_workers_single_data(method, **kwargs))


def all_ended(pids: list[int], timeout_s: float = 600.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(psutil.pid_exists(pid) for pid in pids)


def worker_pids(class_name: str) -> list[int]:
    return [process.pid for process in running(f"ray::{class_name}", psutil.Process().children(recursive=True))]


# --- the Python that workers run in ------------------------------------------------------------------------------


def test_worker_has_a_package_that_the_driver_lacks(group: RayWorkerGroup) -> None:
    import packaging

    assert packaging.__version__ != "23.2"
    assert call(group, "version", distribution="packaging") == ["23.2"] * 4
    assert "sample_workers" not in sys.modules


def test_groups_with_conflicting_venvs_exchange_tensors(group: RayWorkerGroup, cluster: RayVirtualCluster) -> None:
    newer = RayWorkerGroup(cluster, builder(PROBE, runtime_env={"pip": {"packages": ["packaging==24.1"]}}), 1)
    assert call(newer, "version", distribution="packaging") == ["24.1"]
    assert call(group, "version", distribution="packaging") == ["23.2"] * 4
    for value in (np.arange(6.0).reshape(2, 3), torch.arange(6).reshape(2, 3)):
        # The result passes from one venv's worker to the other's without going through the driver.
        reference = newer.run_single_worker_single_data("echo", 0, x=value)
        _, received, _ = ray.get(group.run_single_worker_single_data("echo", 3, x=reference))
        assert type(received[1]) is type(value)
        assert (received[1] == value).all()
    assert newer.shutdown()


def test_py_executable_overrides_the_registry(cluster: RayVirtualCluster, tmp_path: Path) -> None:
    link = tmp_path / "bin" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    (tmp_path / "pyvenv.cfg").write_text(Path(sys.prefix, "pyvenv.cfg").read_text())
    (tmp_path / "lib").symlink_to(Path(sys.prefix, "lib"))
    for override in ({"py_executable": str(link)}, {"runtime_env": {"py_executable": str(link)}}):
        overridden = RayWorkerGroup(cluster, builder(PROBE, **override), 1)
        assert call(overridden, "executable") == [str(link)]
        assert overridden.shutdown()
    assert ACTOR_ENVIRONMENT_REGISTRY[PROBE] == sys.executable


def test_unknown_class_fails_before_a_process_starts(cluster: RayVirtualCluster) -> None:
    with pytest.raises(UnregisteredActorError, match=r"sample_workers\.Prob\b.*sample_workers\.Probe"):
        RayWorkerGroup(cluster, builder("sample_workers.Prob"))


def test_missing_class_error_lists_the_classes_of_the_module(cluster: RayVirtualCluster) -> None:
    with pytest.raises(WorkerStartError, match=r"has no 'Absent'.*Probe"):
        RayWorkerGroup(cluster, builder("sample_workers.Absent", py_executable=sys.executable))


def test_activation_reaches_subprocesses_and_nested_actors(group: RayWorkerGroup) -> None:
    prefix = os.path.realpath(group.attestation[1]["prefix"])
    in_child = ray.get(group.run_single_worker_single_data("in_subprocess", 1))
    assert [os.path.realpath(path) for path in in_child[:2]] == [prefix, prefix]
    assert in_child[2] == "1"
    nested = ray.get(group.run_single_worker_single_data("in_nested_actors", 1, distribution="packaging"))
    for executable, virtual_env, version, _ in nested:
        assert os.path.realpath(os.path.dirname(os.path.dirname(executable))) == prefix
        assert os.path.realpath(virtual_env) == prefix
        assert version == "23.2"
    assert [child for *_, child in nested] == [None, "yes"]


# --- variables and metadata ----------------------------------------------------------------------------------------


def test_ranks_and_addresses(group: RayWorkerGroup) -> None:
    variables = call(group, "environment")
    assert [(v["RANK"], v["LOCAL_RANK"], v["WORLD_SIZE"], v["NODE_RANK"]) for v in variables] == [
        (str(rank), str(rank), "4", "0") for rank in range(4)
    ]
    assert {v["MASTER_ADDR"] for v in variables} == {group.master_address}
    assert {v["MASTER_PORT"] for v in variables} == {str(group.master_port)}
    addresses = {v["AVAILABLE_ADDR_LIST"] for v in variables}
    ports = {v["AVAILABLE_PORT_LIST"] for v in variables}
    assert [json.loads(text) for text in addresses] == [[group.master_address] * 4]
    (listed,) = [json.loads(text) for text in ports]
    assert len({*listed, group.master_port}) == 5
    assert call(group, "rank_at_import") == ["0", "1", "2", "3"]


def test_metadata_and_attestation(group: RayWorkerGroup, tmp_path: Path) -> None:
    assert group.world_size == len(group.workers) == 4
    assert [entry["global_rank"] for entry in group.worker_metadata] == [0, 1, 2, 3]
    assert [entry["dp_shard_idx"] for entry in group.worker_metadata] == [0, 0, 1, 1]
    assert group.dp_size == 2
    assert [group.get_dp_leader_worker_idx(shard) for shard in range(2)] == [0, 2]
    with pytest.raises(IndexError, match="2"):
        group.get_dp_leader_worker_idx(2)
    names = [entry["name"] for entry in group.worker_metadata]
    assert len(set(names)) == 4
    assert all(name.startswith("probe-0-") for name in names)
    file = group.write_attestation(tmp_path)
    written = json.loads(file.read_text())
    assert written == group.attestation
    assert len({entry["venv_digest"] for entry in written}) == 1
    assert len(written[0]["venv_digest"]) == 64
    assert [entry["pid"] for entry in written] == call(group, "pid")
    assert {entry["ray"] for entry in written} == {ray.__version__}
    assert {entry["node_id"] for entry in written} == {ray.get_runtime_context().get_node_id()}


def test_variables_of_driver_caller_and_other_groups(
    cluster: RayVirtualCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_HOME", "/driver/$HOME")
    monkeypatch.setenv("UNDOCUMENTED", "driver")
    first = RayWorkerGroup(cluster, builder(PROBE), 1, env_vars={"NCCL_DEBUG": "INFO", "ONLY_FIRST": "1"})
    (variables,) = call(first, "environment")
    assert variables["NCCL_DEBUG"] == "INFO"
    assert variables["HF_HOME"] == "/driver/$HOME"
    assert variables["ONLY_FIRST"] == "1"
    assert "UNDOCUMENTED" not in variables
    assert first.shutdown()
    monkeypatch.delenv("HF_HOME")
    second = RayWorkerGroup(cluster, builder(PROBE), 1)
    (variables,) = call(second, "environment")
    assert variables["NCCL_DEBUG"] == "WARN"
    assert variables.keys().isdisjoint({"ONLY_FIRST", "HF_HOME"})
    assert second.shutdown()


def test_secrets_reach_workers_but_no_log(cluster: RayVirtualCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "driver-secret-4711", "MY_PASSWORD": "caller-secret-4712", "DEMO_TOKEN": "dying-secret-4713"}
    monkeypatch.setenv("HF_TOKEN", secrets["HF_TOKEN"])
    given = {name: secrets[name] for name in ("MY_PASSWORD", "DEMO_TOKEN")}
    group = RayWorkerGroup(cluster, builder(PROBE), 1, env_vars=given)
    (variables,) = call(group, "environment")
    assert {name: variables[name] for name in secrets} == secrets
    assert not any(value in json.dumps(group.attestation) for value in secrets.values())
    assert group.shutdown()
    with pytest.raises(WorkerStartError, match="no convergence") as failure:
        RayWorkerGroup(cluster, builder("sample_workers.DiesInConstructor", "raise"), 1, env_vars=given)
    assert secrets["DEMO_TOKEN"] not in "".join(traceback.format_exception(failure.value))
    # Logs of the dying worker itself are not checked: the worker may write its variables there.
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [path for path in (session / "logs").rglob("*") if path.is_file() and not path.name.startswith("worker-")]
    assert logs
    for value in (secrets["HF_TOKEN"], secrets["MY_PASSWORD"]):
        assert not [path for path in logs if value in path.read_text(errors="replace")]


# --- layouts -------------------------------------------------------------------------------------------------------


def test_tied_groups(cluster: RayVirtualCluster) -> None:
    tied = [(0, [0, 1]), (0, [2, 3])]
    group = RayWorkerGroup(cluster, builder("sample_workers.Configured"), bundle_indices_list=tied)
    arguments = [kwargs for _, kwargs in call(group, "arguments")]
    assert [kwargs["bundle_indices"] for kwargs in arguments] == [(0, [0, 1]), None, (0, [2, 3]), None]
    assert [entry["bundle_indices"] for entry in group.worker_metadata] == [(0, [0, 1])] * 2 + [(0, [2, 3])] * 2
    assert group.dp_size == 2
    assert [group.get_dp_leader_worker_idx(shard) for shard in range(2)] == [0, 2]
    assert group.shutdown()


def test_group_larger_than_its_cluster(cluster: RayVirtualCluster) -> None:
    with pytest.raises(ConfigError, match="5 workers on node 0, which has 4"):
        RayWorkerGroup(cluster, builder(PROBE), workers_per_node=5)
    with pytest.raises(ConfigError, match="ranks"):
        RayWorkerGroup(cluster, builder(PROBE), 2, sharding_annotations=NamedSharding([0, 1, 2], ["data_parallel"]))


def test_groups_share_gpus(ray_local: str) -> None:
    with RayVirtualCluster([2], use_gpus=True, max_colocated_worker_groups=2, num_gpus_per_node=4) as gpus:
        groups = [RayWorkerGroup(gpus, builder(PROBE), name_prefix="half") for _ in range(2)]
        visible = [[v["CUDA_VISIBLE_DEVICES"] for v in call(group, "environment")] for group in groups]
        assert visible[0] == visible[1]
        assert len(set(visible[0])) == 2
        placed = {call(group, "placement_group_id")[0] for group in groups}
        assert placed == {gpus.get_placement_groups()[0].id.hex()}
        with pytest.raises(
            ResourceInsufficientError, match="max_colocated_worker_groups=2.*groups with a worker there: half, half"
        ):
            RayWorkerGroup(gpus, builder(PROBE), name_prefix="third")
        assert all(group.shutdown() for group in groups)
        third = RayWorkerGroup(gpus, builder(PROBE), workers_per_node=1, name_prefix="third")
        assert third.shutdown()


# --- calls ---------------------------------------------------------------------------------------------------------


def test_single_and_multiple_data(group: RayWorkerGroup) -> None:
    assert ray.get(group.run_single_worker_single_data("echo", 2, x=5)) == ("2", 5, None)
    assert call(group, "echo", x="same") == [(str(rank), "same", None) for rank in range(4)]
    on_axis = group.run_all_workers_single_data("echo", run_rank_0_only_axes=["tensor_parallel"], x=1)
    assert ray.get(on_axis) == [("0", 1, None), ("2", 1, None)]
    different = group.run_all_workers_multiple_data("echo", x=[0, 10, 20, 30], common_kwargs={"y": "all"})
    assert ray.get(different) == [(str(rank), 10 * rank, "all") for rank in range(4)]
    leaders = group.run_all_workers_multiple_data("echo", run_rank_0_only_axes=["tensor_parallel"], x=[1, 2])
    assert ray.get(leaders) == [("0", 1, None), ("2", 2, None)]


def test_replicated_data_is_stored_once_and_not_copied(group: RayWorkerGroup) -> None:
    array = np.zeros(1_000_000)
    before = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
    results = call(group, "address_of_array", x=array)
    assert not any(writeable for _, writeable in results)  # a view of the object store, not a copy
    after = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
    assert len(after) <= len(before) + 1 + len(results)


@pytest.mark.parametrize(
    ("bad_call", "error", "message"),
    [
        (lambda g: g.run_all_workers_single_data("ecko"), AttributeError, "no method 'ecko'.*echo"),
        (lambda g: g.run_single_worker_single_data("echo", 4), IndexError, "worker 4"),
        (lambda g: g.run_all_workers_multiple_data("echo", x=[1, 2, 3]), ValueError, "3 entries, but 4 workers"),
        (lambda g: g.run_all_workers_multiple_data("echo", x=[1] * 4, common_kwargs={"x": 1}), ValueError, "'x'"),
        (lambda g: g.run_all_workers_single_data("echo", run_rank_0_only_axes=["pipe"]), ValueError, "'pipe'"),
        (lambda g: g.run_all_workers_single_data("echo", 1), TypeError, "positional"),
        (lambda g: g.run_all_workers_single_data("echo", z=1), TypeError, "z"),
        (
            lambda g: g.run_all_workers_sharded_data("echo", in_sharded_axes=["data_parallel"], x=[1, 2, 3]),
            ValueError,
            "3 entries, but axis 'data_parallel' has 2",
        ),
    ],
)
def test_invalid_calls(
    group: RayWorkerGroup, bad_call: Callable[[RayWorkerGroup], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bad_call(group)


def test_sharded_data(group: RayWorkerGroup) -> None:
    future = group.run_all_workers_sharded_data(
        "echo",
        in_sharded_axes=["data_parallel"],
        replicate_on_axes=["tensor_parallel"],
        output_is_replicated=["tensor_parallel"],
        x=[np.zeros(2), np.ones(2)],
        common_kwargs={"y": 7},
    )
    assert future.called_workers == [0, 1, 2, 3]
    results = group.get_all_worker_results(future)
    assert [(rank, x.tolist(), y) for rank, x, y in results] == [("0", [0, 0], 7), ("2", [1, 1], 7)]


def test_free_axes_and_dummy_calls(group: RayWorkerGroup) -> None:
    axes = {"in_sharded_axes": ["data_parallel"], "x": ["a", "b"], "common_kwargs": {"y": 1}}
    without = group.run_all_workers_sharded_data("echo", **axes)
    assert without.called_workers == [0, 2]
    assert group.get_all_worker_results(without) == [("0", "a", 1), ("2", "b", 1)]
    with_dummies = group.run_all_workers_sharded_data("echo", make_dummy_calls_to_free_axes=True, **axes)
    assert with_dummies.called_workers == [0, 1, 2, 3]
    assert ray.get(with_dummies.futures) == [("0", "a", 1), ("1", None, 1), ("2", "b", 1), ("3", None, 1)]
    assert group.get_all_worker_results(with_dummies) == [("0", "a", 1), ("2", "b", 1)]


def test_data_is_nested_in_the_order_of_in_sharded_axes(cluster: RayVirtualCluster) -> None:
    sharding = NamedSharding(np.arange(4).reshape(2, 1, 2), ["pipeline", "tensor", "data"])
    group = RayWorkerGroup(cluster, builder(PROBE), sharding_annotations=sharding)
    future = group.run_all_workers_sharded_data(
        "echo",
        in_sharded_axes=["data", "pipeline"],
        replicate_on_axes=["tensor"],
        x=[["d0p0", "d0p1"], ["d1p0", "d1p1"]],
    )
    assert [x for _, x, _ in group.get_all_worker_results(future)] == ["d0p0", "d1p0", "d0p1", "d1p1"]
    replicated = group.run_all_workers_sharded_data("echo", replicate_on_axes=["pipeline", "tensor", "data"], x=[1, 2])
    assert [x for _, x, _ in group.get_all_worker_results(replicated)] == [[1, 2]] * 4
    assert group.shutdown()


def test_results_of_generators(group: RayWorkerGroup) -> None:
    future = group.run_all_workers_sharded_data("numbers", in_sharded_axes=["data_parallel"], n=[2, 3])
    assert group.get_all_worker_results(future) == [[0, 1], [0, 1, 2]]
    future = group.run_all_workers_sharded_data("numbers", in_sharded_axes=["data_parallel"], n=[2, 3])
    proxies = group.get_all_worker_results(future, return_generators_as_proxies=True)
    assert [[ray.get(item) for item in proxy] for proxy in proxies] == [[0, 1], [0, 1, 2]]


def test_error_of_a_method_is_raised_unchanged(group: RayWorkerGroup) -> None:
    with pytest.raises(KeyError, match="a bug of the worker"):
        call(group, "fail")


def test_results_of_tied_groups_are_those_of_their_leaders(cluster: RayVirtualCluster) -> None:
    sharding = NamedSharding([[0, 1], [2, 3]], ["data_parallel", "tied"])
    group = RayWorkerGroup(
        cluster, builder(PROBE), bundle_indices_list=[(0, [0, 1]), (0, [2, 3])], sharding_annotations=sharding
    )
    future = group.run_all_workers_sharded_data(
        "echo", in_sharded_axes=["data_parallel"], replicate_on_axes=["tied"], x=["a", "b"]
    )
    assert group.get_all_worker_results(future) == [("0", "a", None), ("2", "b", None)]
    assert group.shutdown()


# --- failures and shutdown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "message"), [("raise", "no convergence"), ("exit", "exiting without an exception")])
def test_death_in_a_constructor_ends_the_group(cluster: RayVirtualCluster, how: str, message: str) -> None:
    with pytest.raises(WorkerStartError, match=message) as failure:
        RayWorkerGroup(cluster, builder("sample_workers.DiesInConstructor", how), 3, name_prefix=f"dying-{how}")
    assert f"rank 2 (dying-{how}-0-2" in str(failure.value)
    assert all_ended(worker_pids("DiesInConstructor"))


@pytest.mark.slow  # waits for a timeout
def test_start_timeout_names_the_workers(cluster: RayVirtualCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_RL_WORKER_START_TIMEOUT_S", "6")
    with pytest.raises(
        WorkerStartError, match=r"2 of 2 workers .* did not start within 6 s: rank 0 \(late-0-0.*rank 1"
    ):
        RayWorkerGroup(cluster, builder("sample_workers.DiesInConstructor", "late"), 2, "late")
    assert all_ended(worker_pids("DiesInConstructor"))


def test_driver_checks_constructor_arguments(cluster: RayVirtualCluster) -> None:
    with pytest.raises(WorkerStartError, match=r"DiesInConstructor\(\.\.\.\): missing a required argument: 'how'"):
        RayWorkerGroup(cluster, builder("sample_workers.DiesInConstructor"))


def test_death_during_a_call(cluster: RayVirtualCluster) -> None:
    group = RayWorkerGroup(cluster, builder(PROBE), 2, name_prefix="mortal")
    pids = call(group, "pid")
    with pytest.raises(WorkerError, match=r"rank 1 \(mortal-0-1.*on node 127\.0\.0\.1") as failure:
        call(group, "die", rank=1)
    assert isinstance(failure.value.__cause__, ray.exceptions.RayActorError)
    group.shutdown(force=True)
    assert all_ended(pids)


def test_death_is_raised_instead_of_the_error_of_a_peer(cluster: RayVirtualCluster) -> None:
    group = RayWorkerGroup(cluster, builder(PROBE), 2, name_prefix="connected")
    short = tempfile.TemporaryDirectory(dir="/tmp")  # the path of a socket has at most 107 bytes
    with short as directory, pytest.raises(WorkerError, match=r"rank 1 \(connected-0-1") as failure:
        call(group, "die_connected", path=f"{directory}/peer")
    death = failure.value.__cause__
    assert isinstance(death, ray.exceptions.RayActorError)
    assert "closed by the peer" in str(death.__cause__)
    group.shutdown(force=True)


def test_shutdown_with_cleanup(cluster: RayVirtualCluster, tmp_path: Path) -> None:
    group = RayWorkerGroup(cluster, builder(PROBE), 2)
    pids = call(group, "pid")
    call(group, "mark", directory=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert not group.shutdown(cleanup_method="refuse")
    assert group.shutdown()
    assert group.workers == []
    assert all_ended(pids)
    with pytest.raises(WorkerError, match="shut down"):
        group.run_all_workers_single_data("pid")


def test_shutdown_lets_workers_exit(cluster: RayVirtualCluster, tmp_path: Path) -> None:
    group = RayWorkerGroup(cluster, builder(PROBE), 1)
    pids = call(group, "pid")
    call(group, "write_at_exit", path=str(tmp_path / "exit"))
    assert group.shutdown()
    assert all_ended(pids)
    assert (tmp_path / "exit").read_text() == "exited"


def test_shutdown_timeout_kills_workers(cluster: RayVirtualCluster) -> None:
    group = RayWorkerGroup(cluster, builder(PROBE), 1)
    (pid,) = call(group, "pid")
    group.run_all_workers_single_data("sleep", seconds=300)
    with pytest.raises(AttributeError, match="no method 'vanish'"):
        group.shutdown(cleanup_method="vanish")
    assert not group.shutdown(timeout=0.5)
    assert all_ended([pid])


@pytest.mark.parametrize("timeout", [None, float("inf")])
def test_shutdown_without_time_limit(cluster: RayVirtualCluster, timeout: float | None) -> None:
    group = RayWorkerGroup(cluster, builder(PROBE), 1)
    (pid,) = call(group, "pid")
    assert group.shutdown(cleanup_method="pid", timeout=timeout)
    assert all_ended([pid])
    assert group.shutdown(timeout=timeout)


def test_failed_shutdown_can_be_repeated(cluster: RayVirtualCluster) -> None:
    group = RayWorkerGroup(cluster, builder(PROBE), 1)
    pids = call(group, "pid")
    for timeout in (-1, float("nan"), "5", True):
        with pytest.raises(ValueError, match="timeout must be a number of seconds"):
            group.shutdown(cleanup_method="pid", timeout=timeout)  # type: ignore[arg-type]
        assert call(group, "pid") == pids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "_clean_up", interrupt)
        with pytest.raises(KeyboardInterrupt):
            group.shutdown(cleanup_method="pid")
    assert call(group, "pid") == pids
    assert group.shutdown(force=True)
    assert group.workers == []
    assert all_ended(pids)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_forced_shutdown(cluster: RayVirtualCluster) -> None:
    group = RayWorkerGroup(cluster, builder(PROBE), 1)
    (pid,) = call(group, "pid")
    group.run_all_workers_single_data("sleep", seconds=300)
    assert group.shutdown(force=True)
    assert all_ended([pid])


def test_actor_names_are_predictable_until_they_are_taken(cluster: RayVirtualCluster) -> None:
    first = RayWorkerGroup(cluster, builder(PROBE), workers_per_node=[2], name_prefix="named")
    assert [entry["name"] for entry in first.worker_metadata] == ["named-0-0", "named-0-1"]
    assert ray.get_actor("named-0-1") == first.workers[1]
    second = RayWorkerGroup(cluster, builder(PROBE), workers_per_node=[2], name_prefix="named")
    names = [entry["name"] for entry in second.worker_metadata]
    assert len({name.removeprefix(f"named-0-{index}") for index, name in enumerate(names)}) == 1
    assert names != [entry["name"] for entry in first.worker_metadata]
    assert first.dp_leader_worker_indices == [0, 1]
    second.shutdown(force=True)
    first.shutdown(force=True)


def test_runtime_env_for_a_plain_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    runtime_env = make_actor_runtime_env(PROBE)
    assert runtime_env["py_executable"] == sys.executable
    assert "hf_secret" not in str(runtime_env)

    @ray.remote(num_cpus=0)
    class Plain:
        def python(self) -> str:
            return sys.executable

    assert ray.get(Plain.options(runtime_env=runtime_env).remote().python.remote()) == sys.executable
