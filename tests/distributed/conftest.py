"""Ray for the tests of this room: a small local cluster, or several simulated nodes on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from nemo_rl.distributed.ray_session import start_local_ray


@pytest.fixture(scope="module")
def ray_local() -> Iterator[str]:
    """A local cluster with 8 CPUs and 4 pretended GPUs that no other process joins; the value is its address."""
    assert not ray.is_initialized(), "another test left Ray running"
    yield start_local_ray(num_cpus=8, num_gpus=4)
    ray.shutdown()
