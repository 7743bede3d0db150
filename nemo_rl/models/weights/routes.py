"""Chooses the transports between policy and generation, and the policy worker that sends to each receiver."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_rl.distributed.cluster.bundles import Bundle
from nemo_rl.errors import ConfigError
from nemo_rl.models.weights.transports import make_transport


@dataclass(frozen=True)
class Place:
    """Locates a worker: the id of its Ray node, and its GPU there (None for a worker on CPUs)."""

    node_id: str
    gpu_id: str | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> Place:
        """Return the place of a worker on this bundle."""
        return cls(bundle.node_id, bundle.gpu_id)


@dataclass(frozen=True)
class Route:
    """Names the transports between policy and generation.

    Attributes:
        published: transport of published weights.
        streamed: transport of streamed weights; None: weights are never streamed.
        spans_nodes: whether driver and workers are on several nodes.
    """

    published: str = "ray"
    streamed: str | None = None
    spans_nodes: bool = True


def choose_route(
    chosen: str, *, policy: Sequence[Place], generation: Sequence[Place], driver_node_id: str | None
) -> Route:
    """Return the configured transport, or the fastest ones that reach all workers (`auto`).

    Example:
        Two workers on the same node share its memory::

            place = Place("node-id")
            route = choose_route("auto", policy=[place], generation=[place], driver_node_id="node-id")

    Raises:
        WeightSyncError: the transport is unknown.
        ConfigError: the transport does not reach all workers.
    """
    best = _best_route(policy, generation, driver_node_id)
    if chosen == "auto":
        return best
    transport = make_transport(chosen)
    if chosen == "shared_memory" and best.published != chosen:
        raise _unreachable(chosen, "for driver and workers on one Linux node, and here they are on several")
    if transport.on_gpu and not _all_on_gpus(policy, generation):
        raise _unreachable(chosen, "for workers on GPUs, and here not all of them have one")
    if chosen == "cuda_ipc" and best.streamed != chosen:
        raise _unreachable(chosen, "for generation on the policy's GPUs, and here it has separate GPUs")
    if chosen == "nccl" and best.streamed == "cuda_ipc":
        raise _unreachable(chosen, "for generation on separate GPUs, and here it shares the policy's")
    return replace(
        best,
        published=chosen if transport.publishes else best.published,
        streamed=chosen if transport.streams else None,
    )


def assign_senders(senders: Sequence[Place], receivers: Sequence[Place]) -> list[int]:
    """Return the index of a sender for each receiver.

    A receiver gets the sender on its GPU, else the one with the fewest receivers on its node, else the one with the
    fewest receivers. Ties go to the first.
    """
    load = [0] * len(senders)
    assigned = []
    for receiver in receivers:
        best = min(
            range(len(senders)),
            key=lambda index: (
                not (senders[index] == receiver and receiver.gpu_id is not None),
                senders[index].node_id != receiver.node_id,
                load[index],
            ),
        )
        load[best] += 1
        assigned.append(best)
    return assigned


def _best_route(policy: Sequence[Place], generation: Sequence[Place], driver_node_id: str | None) -> Route:
    spans_nodes = len({driver_node_id, *(place.node_id for place in (*policy, *generation))}) > 1
    by_shared_memory = not spans_nodes and sys.platform == "linux"
    if _all_on_gpus(policy, generation):
        streamed = "cuda_ipc" if set(generation) <= set(policy) else "nccl"
    else:
        streamed = "shared_memory" if by_shared_memory else "gloo"
    return Route("shared_memory" if by_shared_memory else "ray", streamed, spans_nodes)


def _all_on_gpus(policy: Sequence[Place], generation: Sequence[Place]) -> bool:
    return all(place.gpu_id is not None for place in (*policy, *generation))


def _unreachable(chosen: str, reason: str) -> ConfigError:
    return ConfigError(f"policy.weight_transport={chosen} is {reason}. Set it to auto or ray.")
