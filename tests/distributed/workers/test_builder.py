"""Single workers on a real local Ray cluster: class descriptions and the precedence of options."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from nemo_rl.distributed import ray_actor_environment_registry as registry
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.worker_groups import RayWorkerGroup
from nemo_rl.distributed.workers.builder import RayWorkerBuilder, WorkerRequest
from nemo_rl.distributed.workers.class_description import ClassDescription
from nemo_rl.distributed.workers.host import describe_class, load_class
from nemo_rl.distributed.workers.runtime_env import ConfiguredWorker
from nemo_rl.distributed.workers.startup import StartingWorker, await_started
from nemo_rl.errors import AttestationError, RuntimeEnvError, WorkerStartError

SOURCES = Path(__file__).parent.with_name("worker_sources")
DECORATED = "sample_workers.Decorated"

pytestmark = pytest.mark.usefixtures("ray_local", "store")


def builder(fqn: str, *args: Any, path: Path = SOURCES, **kwargs: Any) -> RayWorkerBuilder:
    env = {"env_vars": {"PYTHONPATH": str(path)}}
    return RayWorkerBuilder(fqn, *args, py_executable=sys.executable, runtime_env=env, **kwargs)


@pytest.fixture(scope="module")
def decorated(ray_local: str, store: None) -> Iterator[ray.actor.ActorHandle]:
    handle = builder(DECORATED, 10, factor=2)(None, 0, 0, runtime_env={"env_vars": {"FROM_BOTH": "call"}}, name="deco")
    yield handle
    ray.kill(handle)


# --- handles ------------------------------------------------------------------------------------------


def test_every_kind_of_method(decorated: Any) -> None:
    assert ray.get(decorated.add.remote(1)) == 22
    assert [ray.get(item) for item in decorated.count_to.remote(3)] == [0, 1, 2]
    assert [ray.get(item) for item in decorated.numbers.remote(2)] == [0, 1]
    assert ray.get(decorated.double.remote(4)) == 8
    assert ray.get(decorated.name.remote()) == "Decorated"
    assert ray.get(list(decorated.pair.remote())) == [10, 2]
    assert "sample_workers" not in sys.modules


def test_handle_checks_arguments_and_works_in_other_actors(decorated: Any) -> None:
    with pytest.raises(TypeError, match="too many"):
        decorated.add.remote(1, 2)
    assert ray.get(ray.get_actor("deco").double.remote(3)) == 6

    @ray.remote(num_cpus=0)
    def use(handle: Any) -> int:
        return ray.get(handle.double.remote(5))

    assert ray.get(use.remote(decorated)) == 10


def test_closures_run_on_the_worker(decorated: Any) -> None:
    def set_base(worker: Any) -> int:
        worker.extra = worker.base + 1
        return worker.extra

    assert ray.get(decorated.__ray_call__.remote(set_base)) == 11
    assert ray.get(decorated.__ray_call__.remote(lambda worker: worker.__dict__["_nrl_worker"].extra)) == 11


def test_options_of_class_and_call(decorated: Any) -> None:
    assert ray.get(decorated.resources.remote()) == {"CPU": 0.25}
    variables = ray.get(decorated.variables.remote())
    assert variables["FROM_CLASS"] == "class"
    assert variables["FROM_BOTH"] == "call"
    cheaper = builder(DECORATED, 1)(None, 0, 0, num_cpus=0.125)
    assert ray.get(cheaper.resources.remote()) == {"CPU": 0.125}
    ray.kill(cheaper)


def test_configure_worker_takes_precedence(caplog: pytest.LogCaptureFixture) -> None:
    with RayVirtualCluster([1], use_gpus=False) as cluster:
        (group,) = cluster.get_placement_groups()
        with caplog.at_level(logging.WARNING):
            handle = builder("sample_workers.Configured", 1, key="value")(
                group,
                0,
                num_gpus=0,
                bundle_indices=(0, [0]),
                num_gpus_per_node=4,
                num_cpus=0.5,
                runtime_env={"env_vars": {"SHARED": "call"}},
            )
        _, kwargs = ray.get(handle.arguments.remote())
        assert kwargs == {"key": "value", "bundle_indices": (0, [0]), "given": (0, 4)}
        variables = ray.get(handle.environment.remote())
        assert (variables["CONFIGURED"], variables["SHARED"], variables["LD_TEST"]) == ("yes", "class", "early")
        assert ray.get(handle.resources.remote())["CPU"] == 0.125
        assert ray.get(handle.placement_group_id.remote()) == group.id.hex()
        assert "configure_worker overrides num_cpus=0.5 with 0.125" in caplog.text
        assert "configure_worker overrides env_vars.SHARED='call' with 'class'" in caplog.text
        ray.kill(handle)


def test_create_worker_async_keeps_errors() -> None:
    future = builder("sample_workers.Probe", 3).create_worker_async(None, 0, 0, num_cpus=0)
    failing = builder("sample_workers.Probe").create_worker_async(None, 0, 0, num_cpus=0, no_such_option=1)
    handle = future.result()
    assert ray.get(handle.arguments.remote()) == ((3,), {})
    ray.kill(handle)
    with pytest.raises(ValueError, match="no_such_option"):
        failing.result()


def test_stopped_start_ends_and_cannot_be_cancelled() -> None:
    stopped = threading.Event()
    in_constructor = {"env_vars": {"RANK": "0", "WORLD_SIZE": "2"}}
    future = builder("sample_workers.DiesInConstructor", "late").create_worker_async(
        None, 0, 0, num_cpus=0, runtime_env=in_constructor, stopped=stopped
    )
    assert not future.cancel(), "a cancelled start would leave a thread that starts Ray again after its shutdown"
    stopped.set()
    with pytest.raises(WorkerStartError, match="was stopped while it started"):
        future.result()


def test_references_are_resolved_for_the_constructor() -> None:
    handle = builder("sample_workers.Probe", ray.put("stored"), key=ray.put("too"))(None, 0, 0, num_cpus=0)
    assert ray.get(handle.arguments.remote()) == (("stored",), {"key": "too"})
    ray.kill(handle)


def test_initializers_need_no_cpu(tmp_path: Path) -> None:
    (tmp_path / "undescribed_workers.py").write_text("class New:\n    def ping(self):\n        return 'pong'\n")
    with RayVirtualCluster([int(ray.available_resources()["CPU"])], use_gpus=False) as all_cpus:
        assert all_cpus.bundles()
        assert ray.available_resources().get("CPU", 0) < 1
        new = builder("undescribed_workers.New", path=tmp_path)
        group = RayWorkerGroup(all_cpus, new, workers_per_node=1)
        assert ray.get(group.run_all_workers_single_data("ping")) == ["pong"]
        assert group.shutdown()


def test_example_of_the_builder() -> None:
    """The example in the docstring of `RayWorkerBuilder`."""
    counter = RayWorkerBuilder("collections.Counter", "abracadabra", py_executable=sys.executable)(None, 0, num_gpus=0)
    assert ray.get(counter.most_common.remote(1)) == [("a", 5)]
    ray.kill(counter)


# --- the Python --------------------------------------------------------------------------------------------------


def test_conflicting_fields_fail_before_a_process_starts() -> None:
    with pytest.raises(RuntimeEnvError, match="'conda' and 'py_executable'"):
        RayWorkerBuilder("a.B", py_executable=sys.executable, runtime_env={"conda": "base"})
    with pytest.raises(RuntimeEnvError, match="'pip' and 'uv'"):
        RayWorkerBuilder("a.B", runtime_env={"pip": ["a"], "uv": ["b"]})
    with pytest.raises(RuntimeEnvError, match="Keep one"):
        RayWorkerBuilder("a.B", py_executable=sys.executable, runtime_env={"py_executable": "/usr/bin/python3"})


def test_worker_in_the_wrong_venv_fails_attestation() -> None:
    probe = builder("sample_workers.Probe")
    plan = probe.plan(runtime_env={"uv": ["packaging==23.2"]})
    assert plan.python.digest is not None
    wrong = replace(plan, python=replace(plan.python, digest="0" * 64))
    handle = probe._create(wrong, WorkerRequest("rank 5", ray_options={"num_cpus": 0}), ConfiguredWorker())
    with pytest.raises(AttestationError, match=f"rank 5.*expected 0+, found {plan.python.digest}"):
        await_started([StartingWorker(handle, plan.fqn, "rank 5")])
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(handle.pid.remote())


@pytest.mark.slow  # starts Ray workers of another project
def test_worker_of_another_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "third_party_workers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-workers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{registry.ENTRY_POINT_GROUP}]\nthird_party_workers.Greeter = third_party_settings:PYTHON\n"
    )
    (tmp_path / "third_party_settings.py").write_text(f"PYTHON = {sys.executable!r}\n")
    (tmp_path / "third_party_workers.py").write_text(
        "class Greeter:\n    def greet(self, name):\n        return f'hello {name}'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._entry_points.cache_clear()
    try:
        env = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
        with RayVirtualCluster([1], use_gpus=False) as cluster:
            group = RayWorkerGroup(cluster, RayWorkerBuilder("third_party_workers.Greeter", runtime_env=env))
            assert ray.get(group.run_all_workers_single_data("greet", name="you")) == ["hello you"]
            assert group.shutdown()
    finally:
        registry._entry_points.cache_clear()
    assert "third_party_workers" not in sys.modules


# --- descriptions --------------------------------------------------------------------------------------------------


@pytest.mark.slow  # starts groups
def test_edited_class_is_described_again(tmp_path: Path) -> None:
    source = tmp_path / "edited_workers.py"
    source.write_text("class Edited:\n    def old(self):\n        return 1\n")
    edited = builder("edited_workers.Edited", path=tmp_path)
    first = edited(None, 0, 0, num_cpus=0)
    assert ray.get(first.old.remote()) == 1
    ray.kill(first)
    source.write_text("class Edited:\n    async def new(self, x):\n        return x\n")
    second = edited(None, 0, 0, num_cpus=0)
    assert ray.get(second.new.remote(2)) == 2
    assert not hasattr(second, "old")
    ray.kill(second)
    assert edited.plan().description.methods == ("new",)
    source.write_text("class Edited:\n    def newest(self):\n        return 3\n")
    with RayVirtualCluster([2], use_gpus=False) as cluster:
        group = RayWorkerGroup(cluster, edited)
        assert ray.get(group.run_all_workers_single_data("newest")) == [3, 3]
        assert group.shutdown()


def test_cached_description_does_not_reject_new_arguments(tmp_path: Path) -> None:
    source = tmp_path / "grown_workers.py"
    source.write_text("class Grown:\n    def __init__(self): pass\n")
    builder("grown_workers.Grown", path=tmp_path).plan()
    source.write_text(
        "class Grown:\n    def __init__(self, size): self.size = size\n    def get(self): return self.size\n"
    )
    grown = builder("grown_workers.Grown", 3, path=tmp_path)
    worker = grown(None, 0, 0, num_cpus=0)
    assert ray.get(worker.get.remote()) == 3
    ray.kill(worker)
    with pytest.raises(WorkerStartError, match="too many positional arguments"):
        builder("grown_workers.Grown", 3, 4, path=tmp_path)(None, 0, 0, num_cpus=0)


def test_descriptions_are_cached_between_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = builder("sample_workers.Probe")
    cached = probe.plan().description
    # An initializer would time out now; the cached description needs none.
    monkeypatch.setenv("NEMO_RL_WORKER_START_TIMEOUT_S", "0.001")
    assert probe.plan().description == cached


def test_description_matches_the_class() -> None:
    code = f"""
import sys; sys.path.insert(0, {str(SOURCES)!r})
import json
from nemo_rl.distributed.workers.host import describe_class, load_class
print(json.dumps(describe_class({DECORATED!r}, *load_class({DECORATED!r}))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain = json.loads(done.stdout)
    description = ClassDescription.from_plain(plain)
    assert {name: method["kind"] for name, method in plain["methods"].items()} == {
        "add": "async",
        "count_to": "async_generator",
        "numbers": "generator",
        "double": "plain",
        "name": "plain",
        "pair": "plain",
        "variables": "plain",
        "resources": "plain",
    }
    assert plain["methods"]["pair"]["ray"] == {"__ray_num_returns__": 2}
    assert plain["init"] == [["base", "POSITIONAL_OR_KEYWORD", False], ["factor", "KEYWORD_ONLY", True]]
    assert description.ray_options["max_concurrency"] == 2
    description.check_init_arguments((1,), {"factor": 2})
    with pytest.raises(WorkerStartError, match="unexpected keyword argument 'fuctor'"):
        description.check_init_arguments((1,), {"fuctor": 2})


def test_altered_description_is_rejected() -> None:
    plain = describe_class("collections.Counter", *load_class("collections.Counter"))
    assert ClassDescription.from_plain(plain).fqn == "collections.Counter"
    for key, value in (("methods", {}), ("schema", 0), ("digest", "x")):
        with pytest.raises(ValueError, match="altered"):
            ClassDescription.from_plain({**plain, key: value})


def test_classes_that_cannot_be_loaded() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_class("no_such_package.module.Class")
    with pytest.raises(ImportError, match=r"'json' has no 'Nope'. Its classes: .*JSONDecoder"):
        load_class("json.Nope")
    with pytest.raises(ImportError, match=r"'json' has no 'decodr'.*; its modules: decoder, encoder"):
        load_class("json.decodr.JSONDecoder")
    with pytest.raises(ImportError, match="is a function, not a class"):
        load_class("json.dumps")
    assert load_class("argparse.ArgumentParser")[0].__name__ == "ArgumentParser"
    assert inspect.isclass(load_class("email.message.Message")[0])


def test_configure_worker_must_be_static_or_class_method() -> None:
    class Misconfigured:
        def configure_worker(self, num_gpus: float) -> None: ...

    with pytest.raises(TypeError, match="must be a staticmethod or a classmethod"):
        describe_class("m.Misconfigured", Misconfigured, {})
