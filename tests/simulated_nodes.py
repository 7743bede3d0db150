"""Clusters of several simulated nodes on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from nemo_rl.distributed.cluster import session as ray_session
from nemo_rl.distributed.cluster.session import init_ray


@contextlib.contextmanager
def simulated_nodes(*nodes: dict[str, Any], is_joined: bool = True) -> Iterator[Cluster]:
    """A cluster of one raylet per argument (Ray's node options), of which the first is the head.

    `RAY_ADDRESS` names it while the block runs. `env_vars` of a node are its processes' and nobody else's.

    Args:
        is_joined: whether this process is its driver, on the head's node.
    """
    assert not ray.is_initialized(), "another test left Ray running"
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in ray_session.LOCAL_RAY_VARIABLES.items():
            patch.setenv(name, value)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray_session._keep_loopback_addresses()
        cluster = Cluster()
        stack.callback(cluster.shutdown)
        for options in nodes:
            cluster.add_node(**{"include_dashboard": False, **options})
        patch.setenv("RAY_ADDRESS", cluster.address)
        if is_joined:
            stack.callback(ray.shutdown)
            init_ray()
        yield cluster
