"""The registry of worker classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_rl.distributed import ray_actor_environment_registry as registry
from nemo_rl.distributed.ray_actor_environment_registry import (
    ACTOR_ENVIRONMENT_REGISTRY,
    get_actor_python_env,
    register_actor_environment,
)
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
from nemo_rl.errors import ConfigError, InvalidPyExecutableError, UnregisteredActorError

VLLM_WORKER = "nemo_rl.models.generation.vllm.vllm_worker.VllmGenerationWorker"


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(ACTOR_ENVIRONMENT_REGISTRY)
    registry._entry_points.cache_clear()
    yield
    ACTOR_ENVIRONMENT_REGISTRY.clear()
    ACTOR_ENVIRONMENT_REGISTRY.update(before)
    registry._entry_points.cache_clear()


def _install(site: Path, distribution: str, entry_points: str, module: str = "") -> None:
    """Write the metadata of an installed distribution with these entry points."""
    escaped = distribution.replace("-", "_")
    info = site / f"{escaped}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[nemo_rl.actor_environments]\n{entry_points}\n")
    if module:
        (site / f"{escaped}_envs.py").write_text(module)


@pytest.mark.parametrize(
    ("fqn", "py_executable"),
    [
        (VLLM_WORKER, PY_EXECUTABLES.VLLM),
        ("nemo_rl.models.policy.megatron_policy_worker.MegatronPolicyWorker", PY_EXECUTABLES.MCORE),
        ("nemo_rl.models.policy.torch_policy_worker.TorchPolicyWorker", PY_EXECUTABLES.BASE),
        ("nemo_rl.models.generation.torch.torch_generation_worker.TorchGenerationWorker", PY_EXECUTABLES.BASE),
        ("nemo_rl.environments.math_environment.MathEnvironment", PY_EXECUTABLES.SYSTEM),
    ],
)
def test_workers_of_the_project(fqn: str, py_executable: str) -> None:
    assert get_actor_python_env(fqn) == py_executable


def test_system_switch_applies_at_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")
    assert {get_actor_python_env(fqn) for fqn in ACTOR_ENVIRONMENT_REGISTRY} == {sys.executable}
    with pytest.raises(UnregisteredActorError):
        get_actor_python_env("unknown.Worker")
    monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "0")
    assert get_actor_python_env(VLLM_WORKER) == PY_EXECUTABLES.VLLM


@pytest.mark.usefixtures("clean_registry")
def test_entries_can_be_added_and_deleted() -> None:
    ACTOR_ENVIRONMENT_REGISTRY["mine.Worker"] = "anything"
    assert get_actor_python_env("mine.Worker") == "anything"
    del ACTOR_ENVIRONMENT_REGISTRY["mine.Worker"]
    with pytest.raises(ValueError, match=r"mine\.Worker"):
        get_actor_python_env("mine.Worker")


def test_unknown_name_error_lists_nearest_names_and_remedies() -> None:
    with pytest.raises(ValueError, match="no py_executable") as caught:
        get_actor_python_env("nemo_rl.models.generation.vllm.vllm_worker.VllmGeneratonWorker")
    message = str(caught.value)
    assert "VllmGeneratonWorker" in message
    assert f"Nearest registered names: {VLLM_WORKER}" in message
    for remedy in ("ACTOR_ENVIRONMENT_REGISTRY[", "register_actor_environment(", "nemo_rl.actor_environments"):
        assert remedy in message


def test_class_name_in_another_module_is_suggested() -> None:
    with pytest.raises(ValueError, match=f"Nearest registered names: {VLLM_WORKER}"):
        get_actor_python_env("x.VllmGenerationWorker")


@pytest.mark.usefixtures("clean_registry")
def test_register_function_checks_the_py_executable() -> None:
    register_actor_environment("mine.Worker", "uv run --locked --extra vllm")
    assert get_actor_python_env("mine.Worker") == "uv run --locked --extra vllm"
    register_actor_environment("mine.Worker", sys.executable)
    assert get_actor_python_env("mine.Worker") == sys.executable
    with pytest.raises(InvalidPyExecutableError, match="--isolated"):
        register_actor_environment("mine.Other", "uv run --isolated")
    assert "mine.Other" not in ACTOR_ENVIRONMENT_REGISTRY


@pytest.mark.parametrize("fqn", ["Worker", "", "mine.", "mine.2Worker", "mine:Worker", "mine. Worker"])
def test_register_function_rejects_invalid_class_names(fqn: str) -> None:
    with pytest.raises(ConfigError, match=r"package\.module\.Class"):
        register_actor_environment(fqn, sys.executable)


@pytest.mark.usefixtures("clean_registry")
def test_entry_points_of_another_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(
        tmp_path,
        "third-party",
        "third.worker.Plain = nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES.BASE\n"
        "all_the_rest = third_party_envs:ENVIRONMENTS",
        "ENVIRONMENTS = {'third.worker.Special': 'uv run --locked --extra special'}",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert get_actor_python_env("third.worker.Plain") == PY_EXECUTABLES.BASE
    assert get_actor_python_env("third.worker.Special") == "uv run --locked --extra special"
    ACTOR_ENVIRONMENT_REGISTRY["third.worker.Plain"] = "the dict comes first"
    assert get_actor_python_env("third.worker.Plain") == "the dict comes first"
    with pytest.raises(ValueError, match=r"Nearest registered names: third\.worker\.Special"):
        get_actor_python_env("third.worker.Spezial")


@pytest.mark.usefixtures("clean_registry")
def test_broken_entry_point_does_not_affect_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(
        tmp_path,
        "broken-one",
        "broken.Worker = no_such_module_anywhere:X\nbroken.Number = broken_one_envs:NUMBER",
        "NUMBER = 7",
    )
    _install(tmp_path, "sound-one", "sound.Worker = nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES.SYSTEM")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_actor_python_env("sound.Worker") == sys.executable
    with pytest.raises(ValueError, match=r"broken\.Worker = no_such_module_anywhere:X of broken-one") as caught:
        get_actor_python_env("broken.Worker")
    assert "expected a string, got int" in str(caught.value)


@pytest.mark.usefixtures("clean_registry")
def test_conflicting_distributions_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "dist-a", "shared.Worker = nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES.BASE")
    _install(tmp_path, "dist-b", "shared.Worker = nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES.MCORE")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"dist-a: .*; dist-b: "):
        get_actor_python_env("shared.Worker")
    ACTOR_ENVIRONMENT_REGISTRY["shared.Worker"] = PY_EXECUTABLES.MCORE
    assert get_actor_python_env("shared.Worker") == PY_EXECUTABLES.MCORE


@pytest.mark.usefixtures("clean_registry")
def test_entry_points_are_read_lazily_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(
        tmp_path,
        "counted",
        "any = counted_envs:ENVIRONMENTS",
        "import pathlib\nlog = pathlib.Path(__file__).with_name('imports')\n"
        "log.write_text((log.read_text() if log.exists() else '') + 'x')\nENVIRONMENTS = {'counted.Worker': 'p'}",
    )
    monkeypatch.syspath_prepend(tmp_path)
    get_actor_python_env(VLLM_WORKER)
    assert not (tmp_path / "imports").exists()
    for _ in range(3):
        get_actor_python_env("counted.Worker")
    assert (tmp_path / "imports").read_text() == "x"
