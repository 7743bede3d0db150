"""Who gives a venv to whom: what the driver decides while venvs spread from node to node.

::

    content (digest, Python and platform) ── first node that lacks it ── builds ──► source
                                          ── the others ── wait ── a tree below the source, each node with two below it

One content spreads at a time. The next one then links what the first has brought (most of a second venv is in the
first one), and no two trees wait for each other. The work itself is in `broadcast_peer`.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl.distributed.provisioning.broadcast_peer import CONCURRENCY_GROUPS, Above, VenvSpreadHost
from nemo_rl.distributed.provisioning.node_task import Request
from nemo_rl.distributed.provisioning.source_sync import task_options

logger = logging.getLogger(__name__)

# Digest of the plan, and the Python and platform that a node has for it.
Content = tuple[str, str]

_FANOUT = 2
# A node that has failed to receive so often builds for itself.
_MAX_ATTEMPTS = 2
_CLOSE_TIMEOUT_S = 10.0


@dataclass
class _State:
    """One content.

    Attributes:
        builder: the node that builds it for all.
        sources: node id -> interpreter of the sealed venv there.
        waiting: node id -> names of the venvs that it waits for.
        attempts: node id -> how often it has been told to receive.
        tree: the nodes that receive, in the order in which they joined, behind the source that gives.
        offer: the source's listings, on their way.
    """

    builder: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)
    attempts: collections.Counter[str] = field(default_factory=collections.Counter)
    tree: list[str] = field(default_factory=list)
    offer: ray.ObjectRef | None = None


@dataclass(frozen=True)
class _Receiving:
    """A node that has been told to receive, and the offer that it was given."""

    content: Content
    node_id: str
    offer: ray.ObjectRef


class VenvSpread:
    """The contents of one campaign. Only its owner's thread calls it.

    Args:
        requests: what each node is asked for.
        addresses: node id -> what people call it, of every node that may be a source.
        here: the driver's node, which builds and never receives.
    """

    def __init__(self, requests: Mapping[str, Request], addresses: Mapping[str, str], here: str) -> None:
        self._requests = requests
        self._addresses = addresses
        self._here = here
        self._states: dict[Content, _State] = collections.defaultdict(_State)
        self._hosts: dict[str, Any] = {}
        self._retired: list[Any] = []
        self._active: Content | None = None
        self._streams: dict[ray.ObjectRefGenerator, _Receiving] = {}
        self._plans: dict[tuple[Content, tuple[str, ...]], ray.ObjectRef] = {}

    def add_source(self, content: Content, node_id: str, stable_python: str) -> None:
        """A node has it: built, received or found."""
        self._states[content].sources[node_id] = stable_python

    def awaits(self, content: Content, node_id: str, names: list[str]) -> str | None:
        """The node for which this one shall wait with these venvs; None: it shall build them itself."""
        state = self._states[content]
        if node_id != self._here and state.attempts[node_id] < _MAX_ATTEMPTS:
            giver = state.builder if state.builder is not None else next(iter(state.sources), None)
            if giver not in (None, node_id):
                state.waiting.setdefault(node_id, []).extend(names)
                return self._addresses.get(giver, giver)
        if state.builder is None:
            state.builder = node_id
        return None

    def prepare(self, content: Content, node_id: str) -> None:
        """Start the processes that a node will receive through while the venv is still being built."""
        state = self._states[content]
        for taking_part in (state.builder, *list(state.sources)[:1], node_id):
            if taking_part is not None:
                self._host(taking_part)

    def give_up(self, content: Content, node_id: str) -> dict[str, list[str]]:
        """A node failed to build: who waited for it, and for which venvs. Whoever asks later tries for itself."""
        state = self._states[content]
        if state.builder != node_id:
            return {}
        state.builder = None
        if state.sources:
            return {}
        waiting, state.waiting = state.waiting, {}
        return waiting

    def lose(self, node_id: str) -> dict[str, list[str]]:
        """A node left the cluster: who waits for something that nobody has or builds any more, and for which venvs."""
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

    def start(self) -> Iterator[tuple[ray.ObjectRefGenerator, Request]]:
        """Let every node receive that can now; yields the stream of what it tells, and what it was asked for."""
        if self._active is None:
            able = (content for content, state in self._states.items() if state.waiting and state.sources)
            self._active = next(able, None)
        if self._active is None or not self._states[self._active].sources:
            return
        state = self._states[self._active]
        while state.waiting:
            node_id = next(iter(state.waiting))
            yield self._receive(self._active, node_id, state.waiting.pop(node_id))

    def _receive(self, content: Content, node_id: str, names: list[str]) -> tuple[ray.ObjectRefGenerator, Request]:
        state = self._states[content]
        if state.offer is None:
            source, python = next(iter(state.sources.items()))
            state.tree, state.offer = [source], self._host(source).offer.remote(python)
        state.attempts[node_id] += 1
        place, above = len(state.tree), []
        state.tree.append(node_id)
        while place > 0:
            place = (place - 1) // _FANOUT
            if place == 0:
                self._host(state.tree[0])
            if state.tree[place] in self._hosts and state.tree[place] != node_id:
                above.append(Above(self._addresses.get(state.tree[place], ""), self._hosts[state.tree[place]]))
        request = self._requests[node_id]
        request = replace(request, plans={name: request.plans[name] for name in names})
        key = (content, tuple(names))
        if key not in self._plans:
            self._plans[key] = ray.put(request.plans)
        told = replace(request, plans={})
        method = self._host(node_id).receive.options(num_returns="streaming", name=f"venvs to {request.node}")
        stream = method.remote(told, self._plans[key], state.offer, above)
        self._streams[stream] = _Receiving(content, node_id, state.offer)
        return stream, request

    def _host(self, node_id: str) -> Any:
        if node_id not in self._hosts:
            remote: Any = ray.remote  # whose annotations do not know of concurrency groups
            actor = remote(num_cpus=0, max_restarts=0, concurrency_groups=CONCURRENCY_GROUPS)(VenvSpreadHost)
            strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
            self._hosts[node_id] = actor.options(scheduling_strategy=strategy, **task_options(node_id)).remote()
        return self._hosts[node_id]

    def is_receiving(self, stream: ray.ObjectRefGenerator) -> bool:
        """Whether a stream is one that `start` gave out and that has not ended."""
        return stream in self._streams

    def miss(self, stream: ray.ObjectRefGenerator, *, process_died: bool) -> None:
        """A node has not received what it should. `process_died` is about its own process; else the source is to blame.

        The next try is with another source, or with a new process for this one.
        """
        told = self._streams[stream]
        state = self._states[told.content]
        if process_died:
            self._retire(told.node_id)
        # Once for all nodes that were given this offer: the next one may be fine.
        if state.tree and state.offer is told.offer and (not process_died or _has_failed(told.offer)):
            source, state.tree, state.offer = state.tree[0], [], None
            self._retire(source)
            if len(state.sources) > 1 or source != self._here:
                self._drop_source(state, source)

    def end(self, stream: ray.ObjectRefGenerator) -> None:
        """A stream of `start` has ended, in one way or another."""
        if stream in self._streams:
            del self._streams[stream]
            if not any(told.content == self._active for told in self._streams.values()):
                self._active = None

    def _retire(self, node_id: str) -> None:
        """Ask a node's host no more. Others may still be served by it."""
        if node_id in self._hosts:
            self._retired.append(self._hosts.pop(node_id))

    def close(self) -> None:
        """Nobody waits any more: end the hosts, and let them remove what they kept."""
        closing = [host.close.remote() for host in (*self._hosts.values(), *self._retired)]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the hosts at once; what has arrived stays for the next time."""
        for host in (*self._hosts.values(), *self._retired):
            ray.kill(host)
        self._hosts.clear()
        self._retired.clear()


def _has_failed(reference: ray.ObjectRef) -> bool:
    try:
        ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:
        return True
    return False
