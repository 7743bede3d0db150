"""Which transports are chosen, which policy worker sends to which receiver, and what is refused."""

from __future__ import annotations

import sys

import pytest

from nemo_rl.errors import ConfigError, WeightSyncError
from nemo_rl.models.weights.routes import Place, Route, assign_senders, choose_route

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")

HERE, THERE = Place("a"), Place("b")


def gpus(node_id: str, *ids: int) -> list[Place]:
    return [Place(node_id, str(gpu)) for gpu in ids]


def route(policy: list[Place], generation: list[Place], chosen: str = "auto", driver: str = "a") -> Route:
    return choose_route(chosen, policy=policy, generation=generation, driver_node_id=driver)


def test_auto_route_by_placement() -> None:
    assert route([HERE], [HERE, HERE]) == Route("shared_memory", "shared_memory", spans_nodes=False)
    assert route([HERE], [HERE, THERE]) == Route("ray", "gloo", spans_nodes=True)
    assert route([THERE], [THERE]) == Route("ray", "gloo", spans_nodes=True)  # the driver must reach the sender, too
    assert route(gpus("a", 0, 1), gpus("a", 1, 0)) == Route("shared_memory", "cuda_ipc", spans_nodes=False)
    assert route(gpus("a", 0, 1), gpus("a", 2, 3)) == Route("shared_memory", "nccl", spans_nodes=False)
    both = gpus("a", 0, 1) + gpus("b", 0, 1)
    assert route(both, both) == Route("ray", "cuda_ipc", spans_nodes=True)
    assert route(gpus("a", 0), gpus("b", 0)) == Route("ray", "nccl", spans_nodes=True)
    assert route(gpus("a", 0), [HERE]) == Route("shared_memory", "shared_memory", spans_nodes=False)


def test_configured_transport_streams_or_publishes() -> None:
    assert route([HERE], [HERE], "ray") == Route("ray", None, spans_nodes=False)
    assert route([HERE], [HERE], "gloo") == Route("shared_memory", "gloo", spans_nodes=False)
    assert route(gpus("a", 0), gpus("a", 0), "shared_memory") == Route("shared_memory", "shared_memory", False)


@pytest.mark.parametrize(
    ("chosen", "policy", "generation", "reason"),
    [
        ("shared_memory", [HERE], [THERE], "on one Linux node"),
        ("nccl", [HERE], [HERE], "workers on GPUs"),
        ("cuda_ipc", gpus("a", 0), [HERE], "workers on GPUs"),
        ("cuda_ipc", gpus("a", 0), gpus("a", 1), "on the policy's GPUs"),
        ("nccl", gpus("a", 0), gpus("a", 0), "shares the policy's"),
    ],
)
def test_unreachable_transport_is_refused(
    chosen: str, policy: list[Place], generation: list[Place], reason: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"policy.weight_transport={chosen} is for .*{reason}.* Set it to auto or ray"
    ):
        route(policy, generation, chosen)


def test_unknown_transport_suggests_nearest() -> None:
    with pytest.raises(WeightSyncError, match="unknown weight transport 'ncl'. Did you mean 'nccl'"):
        route([HERE], [HERE], "ncl")


def test_assign_senders_by_gpu_then_node_then_load() -> None:
    policy = gpus("a", 0, 1) + gpus("b", 0, 1)
    assert assign_senders(policy, gpus("b", 1) + gpus("a", 1)) == [3, 1]
    assert assign_senders(policy, gpus("a", 2, 3, 4)) == [0, 1, 0]
    assert assign_senders(policy, gpus("c", 0, 1, 2, 3, 4)) == [0, 1, 2, 3, 0]
    assert assign_senders([HERE, THERE], [THERE, HERE, HERE]) == [1, 0, 0]
    assert assign_senders([HERE], [THERE, HERE]) == [0, 0]
