"""Fixtures for the pipeline tests: a Ray cluster, and a venv directory that all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from nemo_rl import venvs
from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.errors import VenvBuildError
from nemo_rl.pipelines import Executor, RayActorPoolExecutor, RayDataExecutor


@pytest.fixture(scope="session")
def shared_venvs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The venv directory of all pipeline tests."""
    return tmp_path_factory.mktemp("venvs")


@pytest.fixture(autouse=True)
def _venv_dir(shared_venvs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(shared_venvs))


@pytest.fixture
def xenna_python() -> str:
    """The interpreter of an additive venv with cosmos-xenna over the tests' venv."""
    spec = venvs.spec_from_runtime_env({"uv": ["cosmos-xenna==0.3.0"]}, sys.executable)
    try:
        return venvs.ensure(spec, "with-xenna").python
    except VenvBuildError as error:
        pytest.skip(f"cosmos-xenna cannot be installed here: {error}")


@pytest.fixture(scope="module")
def ray_local() -> Iterator[str]:
    """The address of a local cluster with 4 CPUs that no other process joins."""
    assert not ray.is_initialized(), "another test left Ray running"
    yield start_local_ray(num_cpus=4, num_gpus=0)
    ray.shutdown()


@pytest.fixture(params=["actor_pool", pytest.param("ray_data", marks=pytest.mark.slow)])
def executor(request: pytest.FixtureRequest) -> Executor:
    """Return each executor in turn. Every run on Ray Data starts an engine of its own, so most of those are slow."""
    return {"actor_pool": RayActorPoolExecutor, "ray_data": RayDataExecutor}[request.param]()
