"""Clusters of several simulated nodes on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from nemo_rl.distributed.cluster.session import LOCAL_RAY_VARIABLES, init_ray
from nemo_rl.distributed.ray_private import keep_loopback_addresses, patient_start


@contextlib.contextmanager
def simulated_nodes(*nodes: dict[str, Any], is_joined: bool = True) -> Iterator[Cluster]:
    """Run a cluster with one raylet per argument (Ray's node options). The first is the head.

    `RAY_ADDRESS` names the cluster while the block runs. The `env_vars` of a node are set in its processes only.

    Args:
        nodes: the options of each node.
        is_joined: whether this process joins the cluster as a driver, on the head node.
    """
    assert not ray.is_initialized(), "another test left Ray running"
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in LOCAL_RAY_VARIABLES.items():
            patch.setenv(name, value)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        keep_loopback_addresses()
        cluster = Cluster()
        stack.callback(cluster.shutdown)
        with patient_start(120.0):
            for options in nodes:
                cluster.add_node(**{"include_dashboard": False, **options})
        patch.setenv("RAY_ADDRESS", cluster.address)
        if is_joined:
            stack.callback(ray.shutdown)
            init_ray()
        yield cluster
