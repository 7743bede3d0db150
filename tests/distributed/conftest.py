"""Ray for the tests of this room: a small local cluster, or several simulated nodes on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from nemo_rl.distributed import ray_session
from nemo_rl.distributed.ray_session import init_ray, start_local_ray


@pytest.fixture(scope="module")
def ray_local() -> Iterator[str]:
    """A local cluster with 8 CPUs and 4 pretended GPUs that no other process joins; the value is its address."""
    assert not ray.is_initialized(), "another test left Ray running"
    yield start_local_ray(num_cpus=8, num_gpus=4)
    ray.shutdown()


@pytest.fixture(scope="module")
def start_nodes() -> Iterator[Callable[..., Cluster]]:
    """A function that starts a cluster of one simulated node per argument (Ray's node options) and connects to it.

    The first is the head, and the driver's own node. `env_vars` of a node are its processes' and nobody else's.
    """
    assert not ray.is_initialized(), "another test left Ray running"
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in ray_session.LOCAL_RAY_VARIABLES.items():
            patch.setenv(name, value)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray_session._keep_loopback_addresses()

        def start(*nodes: dict[str, Any]) -> Cluster:
            cluster = Cluster()
            stack.callback(cluster.shutdown)
            for options in nodes:
                cluster.add_node(**{"include_dashboard": False, **options})
            patch.setenv("RAY_ADDRESS", cluster.address)
            init_ray()
            stack.callback(ray.shutdown)
            return cluster

        yield start
