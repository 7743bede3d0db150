"""Ray for the tests of this room: a small local cluster, or several simulated nodes on this machine."""

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
    """A local cluster with 8 CPUs and 4 pretended GPUs that no other process joins; the value is its address."""
    assert not ray.is_initialized(), "another test left Ray running"
    yield start_local_ray(num_cpus=8, num_gpus=4)
    ray.shutdown()


@pytest.fixture(scope="module")
def start_nodes() -> Iterator[Callable[..., Cluster]]:
    """A function that starts a cluster and connects to it; its arguments are those of `simulated_nodes`."""
    with contextlib.ExitStack() as stack:
        yield lambda *nodes: stack.enter_context(simulated_nodes(*nodes))
