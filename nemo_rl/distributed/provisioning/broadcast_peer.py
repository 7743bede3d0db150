"""A node's side of a venv broadcast: receive the venv, and serve its chunks to the nodes below.

::

    source ◄─ chunk(i) ── node 1 ◄─ chunk(i) ── node 3        Each node requests a few chunks ahead from the node above,
       ▲                     ▲───── chunk(i) ── node 4        stores and unpacks them, and serves the nodes below.
       └───── chunk(i) ── node 2 ◄─ ...                       If the node above fails, it asks the next node up.

A chunk is the return value of an actor method; Ray copies it from object store to object store. A node's object store
holds at most `_WINDOW` requested chunks and `_WINDOW` chunks per node below, so it does not spill.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from nemo_rl.distributed.provisioning.node_task import Request, ending_with_raylet, serve
from nemo_rl.distributed.provisioning.report import NodeProgress, NodeVenv
from nemo_rl.errors import BroadcastError
from nemo_rl.venvs import Store, VenvPlan, hold_lease
from nemo_rl.venvs.progress import PhaseClock
from nemo_rl.venvs.storage.manifest import read_manifest
from nemo_rl.venvs.transfer.archive import Listing, decode_chunk, encode_chunk, list_venv, read_chunk
from nemo_rl.venvs.transfer.arrival import Spool, receive_venv
from nemo_rl.venvs.uv import BuildLog

logger = logging.getLogger(__name__)

# Number of chunks that a node requests ahead.
_WINDOW = 4
# How long an upstream peer waits for a chunk before it answers that it has none. The requesting node waits longer.
_CHUNK_TIMEOUT_S = 60.0
_RECENT_CHUNKS = 8

CONCURRENCY_GROUPS = {"receive": 1, "serve": 3 * _WINDOW}


@dataclass(frozen=True)
class UpstreamPeer:
    """A peer that may have the chunks: the node's address, and the handle of its `BroadcastPeer` actor."""

    node: str
    peer: Any


class BroadcastPeer:
    """Receives and serves venvs on one node in one provisioning call: a Ray actor with `CONCURRENCY_GROUPS`."""

    def __init__(self) -> None:
        # Stream key -> where its chunks come from on this node; None if this node will not have the stream.
        self._feeds: dict[str, _VenvSource | Spool | None] = {}
        self._changed = threading.Condition()
        encode_chunk(b"")  # imports the compressor before the first chunk is requested

    def offer(self, stable_python: str) -> tuple[Listing, ...]:
        """List the sealed venv of an interpreter in this node's store, after the venvs that it is based on.

        Raises `VenvError` if the venv no longer exists.
        """
        link = Path(stable_python).parent.parent
        layers = [link.resolve()]
        while (base := read_manifest(layers[0]).base_digest) is not None:
            layers.insert(0, Store(link.parent.parent).link(base).resolve())
        sources = [_VenvSource(root) for root in layers]
        for source in sources:
            self._set_feed(source.listing.key, source)
        return tuple(source.listing for source in sources)

    @ray.method(concurrency_group="serve")
    def chunk(self, key: str, chunk: int) -> bytes | None:
        """Wait for a chunk of the stream `key` and return it encoded; None if this node does not get it in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._feeds, _CHUNK_TIMEOUT_S):
                return None
            feed = self._feeds[key]
        return feed.wait(chunk, _CHUNK_TIMEOUT_S) if feed is not None else None

    @ray.method(concurrency_group="receive")
    def receive(
        self,
        request: Request,
        plans: dict[str, VenvPlan],
        listings: tuple[Listing, ...],
        upstream_peers: list[UpstreamPeer],
    ) -> Iterator[NodeProgress | NodeVenv]:
        """Receive the venvs of one content; yield what `node_task.serve` yields.

        Args:
            request: the node's request, without its plans.
            plans: the request's plans; a separate argument because the nodes share one copy in the object store.
            listings: the source's listings of the venv and its base.
            upstream_peers: the peers to ask, nearest first; the last one is the source.
        """
        by_digest = {listing.digest: listing for listing in listings}
        upstream = _Upstream(upstream_peers)

        def fill(venv_plan: VenvPlan, root: Path, clock: PhaseClock, log: BuildLog) -> None:
            listing = by_digest.get(venv_plan.digest)
            if listing is None:
                raise BroadcastError(f"{upstream_peers[-1].node} does not have the venv that this node needs.")
            store = Store(root.parent.parent)
            spool = Spool(listing, store)
            self._set_feed(listing.key, spool)
            receive_venv(
                venv_plan,
                root,
                clock,
                log,
                listing=listing,
                spool=spool,
                fetch=lambda chunks: upstream.fetch(listing.key, chunks, spool.put),
                store=store,
                source=upstream_peers[0].node,
            )

        try:
            with ending_with_raylet():
                for item in serve(request, plans, fill):
                    if isinstance(item, NodeVenv) and item.built:
                        yield replace(item, built=False, received_from=upstream_peers[0].node)
                    else:
                        yield item
        finally:
            for key in (listing.key for listing in listings):
                if key not in self._feeds:
                    self._set_feed(key, None)  # this node already had the venv: the nodes below ask the next node up

    def close(self) -> None:
        """Stop serving, and remove the stored chunks."""
        with self._changed:
            feeds, self._feeds = self._feeds, dict.fromkeys(self._feeds)
        for feed in feeds.values():
            if feed is not None:
                feed.close()

    def _set_feed(self, key: str, feed: _VenvSource | Spool | None) -> None:
        with self._changed:
            self._feeds[key] = feed
            self._changed.notify_all()


class _VenvSource:
    """Reads chunks from a sealed venv, and caches recent ones: the nodes below often request the same chunk."""

    def __init__(self, root: Path) -> None:
        self._lease = hold_lease(root)
        self.listing = list_venv(root)
        self._recent: collections.OrderedDict[int, concurrent.futures.Future[bytes]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def wait(self, chunk: int, _timeout_s: float) -> bytes:
        with self._lock:
            future = self._recent.get(chunk)
            must_read = future is None
            if future is None:
                future = self._recent[chunk] = concurrent.futures.Future()
                while len(self._recent) > _RECENT_CHUNKS:
                    self._recent.popitem(last=False)
        if must_read:
            try:
                future.set_result(read_chunk(self.listing, chunk))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def close(self) -> None:
        self._lease.release()


class _Upstream:
    """Requests chunks from the peers above, a few ahead. A peer that cannot send a chunk is not asked again."""

    def __init__(self, peers: Sequence[UpstreamPeer]) -> None:
        self._peers = list(peers)
        self._lock = threading.Lock()

    def fetch(self, key: str, chunks: Sequence[int], store: Callable[[int, bytes], None]) -> Generator[bytes]:
        """Yield the raw bytes of each chunk in order, after `store` has been called with its encoded bytes.

        `_WINDOW` threads wait for, check and decompress the chunks.

        Raises:
            BroadcastError: no peer can send one of the chunks.
        """
        remaining = iter(chunks)
        with concurrent.futures.ThreadPoolExecutor(_WINDOW) as threads:

            def request(chunk: int) -> concurrent.futures.Future[bytes]:
                return threads.submit(self._receive, key, chunk, *self._request(key, chunk), store)

            pending = collections.deque(request(chunk) for chunk in itertools.islice(remaining, _WINDOW))
            while pending:
                yield pending.popleft().result()
                pending.extend(request(chunk) for chunk in itertools.islice(remaining, 1))

    def _request(self, key: str, chunk: int) -> tuple[UpstreamPeer, ray.ObjectRef[bytes | None]]:
        with self._lock:
            if not self._peers:
                raise BroadcastError(f"chunk {chunk} of a venv is unavailable: no upstream node has the complete venv.")
            nearest = self._peers[0]
        return nearest, nearest.peer.chunk.remote(key, chunk)

    def _receive(
        self,
        key: str,
        chunk: int,
        sender: UpstreamPeer,
        reference: ray.ObjectRef[bytes | None],
        store: Callable[[int, bytes], None],
    ) -> bytes:
        while True:
            try:
                data = ray.get(reference, timeout=2 * _CHUNK_TIMEOUT_S)
                if data is not None:
                    raw = decode_chunk(data)
                    store(chunk, data)
                    return raw
                reason = "the node does not have it"
            except (ray.exceptions.RayError, BroadcastError) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
            logger.warning("no chunk %d of a venv from %s: %s", chunk, sender.node, reason)
            with self._lock:
                if sender in self._peers:
                    self._peers.remove(sender)
                if not self._peers:
                    raise BroadcastError(f"no chunk {chunk} of a venv from {sender.node}: {reason}")
            sender, reference = self._request(key, chunk)
