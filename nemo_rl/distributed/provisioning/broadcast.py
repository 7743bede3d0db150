"""The driver's side of a venv broadcast: decide which node sends a venv to which node.

::

    venv (digest, Python and platform) ── first node without it ── builds ──► source
                                          ── other nodes ── wait ── a tree below the source, two nodes below each node

One venv is broadcast at a time. The next broadcast can link files of the first venv (most of a second venv is in the
first one), and two trees never wait for each other. `broadcast_peer` holds the nodes' side.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl.distributed.provisioning.broadcast_peer import CONCURRENCY_GROUPS, BroadcastPeer, UpstreamPeer
from nemo_rl.distributed.provisioning.node_task import Request
from nemo_rl.distributed.provisioning.source_sync import task_options

logger = logging.getLogger(__name__)

# Digest of the plan, and the Python and platform that a node uses for it.
VenvKey = tuple[str, str]

_FANOUT = 2
# After this many failed attempts to receive a venv, a node builds it.
_MAX_ATTEMPTS = 2
_CLOSE_TIMEOUT_S = 10.0


@dataclass
class _State:
    """The state of one venv.

    Attributes:
        builder: the node that builds it for the others.
        sources: node id -> interpreter of the sealed venv on that node.
        waiting: node id -> names of the venvs that the node waits for.
        attempts: node id -> number of attempts to receive it.
        tree: the source, then the receiving nodes in the order in which they joined.
        offer: reference to the pending `offer` call of the source, which returns the file listings of its venv and of
            that venv's bases.
    """

    builder: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)
    attempts: collections.Counter[str] = field(default_factory=collections.Counter)
    tree: list[str] = field(default_factory=list)
    offer: ray.ObjectRef | None = None


@dataclass(frozen=True)
class _Transfer:
    """A node that receives a venv, and the offer that it uses."""

    key: VenvKey
    node_id: str
    offer: ray.ObjectRef


class BroadcastCoordinator:
    """Decides who sends what in one provisioning call. Only the caller's thread may use it.

    Args:
        requests: node id -> the venvs that the node needs.
        addresses: node id -> address, of every node that may be a source.
        driver_node: id of the driver's node, which builds and never receives.
    """

    def __init__(self, requests: Mapping[str, Request], addresses: Mapping[str, str], driver_node: str) -> None:
        self._requests = requests
        self._addresses = addresses
        self._driver_node = driver_node
        self._states: dict[VenvKey, _State] = collections.defaultdict(_State)
        self._peers: dict[str, Any] = {}
        self._retired: list[Any] = []
        self._active: VenvKey | None = None
        self._transfers: dict[ray.ObjectRefGenerator, _Transfer] = {}
        self._plans: dict[tuple[VenvKey, tuple[str, ...]], ray.ObjectRef] = {}

    def add_source(self, key: VenvKey, node_id: str, stable_python: str) -> None:
        """Note that a node has a venv: it built, received or already had it."""
        self._states[key].sources[node_id] = stable_python

    def assign(self, key: VenvKey, node_id: str, names: list[str]) -> str | None:
        """Let a node wait for these venvs, and return the address of the node that will send them.

        Returns None if the node must build them itself; it then is the builder for the other nodes.
        """
        state = self._states[key]
        if node_id != self._driver_node and state.attempts[node_id] < _MAX_ATTEMPTS:
            sender = state.builder if state.builder is not None else next(iter(state.sources), None)
            if sender not in (None, node_id):
                state.waiting.setdefault(node_id, []).extend(names)
                return self._addresses.get(sender, sender)
        if state.builder is None:
            state.builder = node_id
        return None

    def prepare(self, key: VenvKey, node_id: str) -> None:
        """Start the peers of the sender and of a receiving node while the venv is still being built."""
        state = self._states[key]
        for participant in (state.builder, *list(state.sources)[:1], node_id):
            if participant is not None:
                self._peer(participant)

    def fail_build(self, key: VenvKey, node_id: str) -> dict[str, list[str]]:
        """Note that a node failed to build; return node id -> names of the venvs without builder and source.

        A node that asks for the venv later builds it itself.
        """
        state = self._states[key]
        if state.builder != node_id:
            return {}
        state.builder = None
        if state.sources:
            return {}
        waiting, state.waiting = state.waiting, {}
        return waiting

    def remove_node(self, node_id: str) -> dict[str, list[str]]:
        """Remove a lost node; return node id -> names of the venvs without builder and source."""
        orphans: dict[str, list[str]] = {}
        self._retire(node_id)
        for state in self._states.values():
            state.waiting.pop(node_id, None)
            self._drop_source(state, node_id)
            if state.builder is None and not state.sources:
                for other, names in state.waiting.items():
                    orphans.setdefault(other, []).extend(names)
                state.waiting = {}
        return orphans

    def _drop_source(self, state: _State, node_id: str) -> None:
        state.sources.pop(node_id, None)
        if state.builder == node_id:
            state.builder = None
        if state.tree[:1] == [node_id]:
            state.tree, state.offer = [], None

    def start_transfers(self) -> Iterator[tuple[ray.ObjectRefGenerator, Request]]:
        """Start every transfer that can start now; yield the stream of its results and the node's request."""
        if self._active is None:
            ready = (key for key, state in self._states.items() if state.waiting and state.sources)
            self._active = next(ready, None)
        if self._active is None or not self._states[self._active].sources:
            return
        state = self._states[self._active]
        while state.waiting:
            node_id = next(iter(state.waiting))
            yield self._start_transfer(self._active, node_id, state.waiting.pop(node_id))

    def _start_transfer(self, key: VenvKey, node_id: str, names: list[str]) -> tuple[ray.ObjectRefGenerator, Request]:
        state = self._states[key]
        if state.offer is None:
            source, python = next(iter(state.sources.items()))
            state.tree, state.offer = [source], self._peer(source).offer.remote(python)
        state.attempts[node_id] += 1
        position, upstream = len(state.tree), []
        state.tree.append(node_id)
        while position > 0:
            position = (position - 1) // _FANOUT
            if position == 0:
                self._peer(state.tree[0])
            if state.tree[position] in self._peers and state.tree[position] != node_id:
                address = self._addresses.get(state.tree[position], "")
                upstream.append(UpstreamPeer(address, self._peers[state.tree[position]]))
        request = self._requests[node_id]
        request = replace(request, plans={name: request.plans[name] for name in names})
        plan_key = (key, tuple(names))
        if plan_key not in self._plans:
            self._plans[plan_key] = ray.put(request.plans)
        method = self._peer(node_id).receive.options(num_returns="streaming", name=f"venvs to {request.node}")
        stream = method.remote(replace(request, plans={}), self._plans[plan_key], state.offer, upstream)
        self._transfers[stream] = _Transfer(key, node_id, state.offer)
        return stream, request

    def _peer(self, node_id: str) -> Any:
        if node_id not in self._peers:
            remote: Any = ray.remote  # its annotations lack concurrency groups
            actor = remote(num_cpus=0, max_restarts=0, concurrency_groups=CONCURRENCY_GROUPS)(BroadcastPeer)
            strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
            self._peers[node_id] = actor.options(scheduling_strategy=strategy, **task_options(node_id)).remote()
        return self._peers[node_id]

    def is_transfer(self, stream: ray.ObjectRefGenerator) -> bool:
        """Return whether a stream belongs to a transfer that has not ended."""
        return stream in self._transfers

    def fail_transfer(self, stream: ray.ObjectRefGenerator, *, process_died: bool) -> None:
        """Note that a transfer failed, so that the next attempt uses another source or another process.

        Args:
            process_died: whether the receiver's process died; otherwise the source is at fault.
        """
        transfer = self._transfers[stream]
        state = self._states[transfer.key]
        if process_died:
            self._retire(transfer.node_id)
        # Several transfers may fail because of one offer: drop its source only once, not after a new offer has replaced
        # it.
        if state.tree and state.offer is transfer.offer and (not process_died or _has_failed(transfer.offer)):
            source, state.tree, state.offer = state.tree[0], [], None
            self._retire(source)
            if len(state.sources) > 1 or source != self._driver_node:
                self._drop_source(state, source)

    def end_transfer(self, stream: ray.ObjectRefGenerator) -> None:
        """Note that a stream has ended, with or without success. Does nothing for other streams."""
        if stream in self._transfers:
            del self._transfers[stream]
            if not any(transfer.key == self._active for transfer in self._transfers.values()):
                self._active = None

    def _retire(self, node_id: str) -> None:
        """Use a node's peer for no new transfer. It may still serve others."""
        if node_id in self._peers:
            self._retired.append(self._peers.pop(node_id))

    def close(self) -> None:
        """End all peers after they have removed their chunks."""
        closing = [peer.close.remote() for peer in (*self._peers.values(), *self._retired)]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End all peers at once. Their chunks stay for the next call."""
        for peer in (*self._peers.values(), *self._retired):
            ray.kill(peer)
        self._peers.clear()
        self._retired.clear()


def _has_failed(reference: ray.ObjectRef) -> bool:
    try:
        ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:
        return True
    return False
