"""Ray for the tests of `nemo_rl.distributed`: a small local cluster, or several simulated nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import ray
from ray.cluster_utils import Cluster
from simulated_nodes import simulated_nodes

from nemo_rl.distributed.cluster.session import start_local_ray


@pytest.fixture(scope="module")
def ray_local() -> Iterator[str]:
    """Start a local cluster with 8 CPUs and 4 simulated GPUs that no other process joins. Yields its address."""
    assert not ray.is_initialized(), "another test left Ray running"
    yield start_local_ray(num_cpus=8, num_gpus=4)
    ray.shutdown()


@pytest.fixture(scope="module")
def start_nodes() -> Iterator[Callable[..., Cluster]]:
    """Yield a function that starts a cluster and connects to it, with the arguments of `simulated_nodes`."""
    with contextlib.ExitStack() as stack:
        yield lambda *nodes: stack.enter_context(simulated_nodes(*nodes))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set empty directories for venvs and caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_RL_VENV_DIR", str(tmp_path_factory.mktemp("venvs")))
        patch.setenv("NEMO_RL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
