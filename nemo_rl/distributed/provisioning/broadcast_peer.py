"""What a node does while a venv spreads: it receives the venv, and gives every chunk that it has to the nodes below.

::

    source ◄─ chunk(i) ── node 1 ◄─ chunk(i) ── node 3        each node asks the one above for a few chunks ahead,
       ▲                     ▲───── chunk(i) ── node 4        keeps what comes, unpacks it, and answers those below;
       └───── chunk(i) ── node 2 ◄─ ...                       if the one above is gone it asks the next one up

A chunk travels as the return value of an actor's method, from object store to object store. A node holds at most
`_WINDOW` chunks that it asked for and as many for each node below, so no object store ever has to spill.
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

# Chunks that a node asks for ahead of what it unpacks.
_WINDOW = 4
# A node above that has not even started to receive is passed over after this long; the child waits a little longer.
_PATIENCE_S = 60.0
_RECENT_CHUNKS = 8

CONCURRENCY_GROUPS = {"receive": 1, "serve": 3 * _WINDOW}


@dataclass(frozen=True)
class Above:
    """A node that may have the chunks: its name for people, and its `VenvSpreadHost`."""

    node: str
    host: Any


class VenvSpreadHost:
    """One per node and campaign, as a Ray actor with `CONCURRENCY_GROUPS`."""

    def __init__(self) -> None:
        self._feeds: dict[str, _Source | Spool | None] = {}
        self._changed = threading.Condition()
        encode_chunk(b"")  # loads the compressor while there is time

    def offer(self, stable_python: str) -> tuple[Listing, ...]:
        """List the sealed venv of an interpreter in this node's store: first what it is laid over, then itself.

        Raises `VenvError` when it is not there any more.
        """
        link = Path(stable_python).parent.parent
        layers = [link.resolve()]
        while (base := read_manifest(layers[0]).base_digest) is not None:
            layers.insert(0, Store(link.parent.parent).link(base).resolve())
        sources = [_Source(root) for root in layers]
        for source in sources:
            self._set_feed(source.listing.key, source)
        return tuple(source.listing for source in sources)

    @ray.method(concurrency_group="serve")
    def chunk(self, key: str, chunk: int) -> bytes | None:
        """A chunk of the stream `key`, as soon as it is here; None when it will not come."""
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._feeds, _PATIENCE_S):
                return None
            feed = self._feeds[key]
        return feed.wait(chunk, _PATIENCE_S) if feed is not None else None

    @ray.method(concurrency_group="receive")
    def receive(
        self, request: Request, plans: dict[str, VenvPlan], listings: tuple[Listing, ...], above: list[Above]
    ) -> Iterator[NodeProgress | NodeVenv]:
        """Make venvs of one content ready from `listings`; yields what `serve` yields.

        `above` are the nodes to ask, nearest first; the last one is the source.
        """
        by_digest = {listing.digest: listing for listing in listings}
        upstream = _Upstream(above)

        def fill(venv_plan: VenvPlan, root: Path, clock: PhaseClock, log: BuildLog) -> None:
            listing = by_digest.get(venv_plan.digest)
            if listing is None:
                raise BroadcastError(f"{above[-1].node} has another venv than the one that this node needs.")
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
                fetch=lambda wanted: upstream.fetch(listing.key, wanted, spool.put),
                store=store,
                source=above[0].node,
            )

        try:
            with ending_with_raylet():
                for item in serve(replace(request, plans=plans), fill):
                    if isinstance(item, NodeVenv) and item.built:
                        yield replace(item, built=False, received_from=above[0].node)
                    else:
                        yield item
        finally:
            for key in (listing.key for listing in listings):
                if key not in self._feeds:
                    self._set_feed(key, None)  # it was here already: those below ask further up

    def close(self) -> None:
        """All nodes are done: nothing is served any more, and what was kept for that is removed."""
        with self._changed:
            feeds, self._feeds = self._feeds, dict.fromkeys(self._feeds)
        for feed in feeds.values():
            if feed is not None:
                feed.close()

    def _set_feed(self, key: str, feed: _Source | Spool | None) -> None:
        with self._changed:
            self._feeds[key] = feed
            self._changed.notify_all()


class _Source:
    """A sealed venv, read as it is asked for. The nodes right below ask for the same chunks at about the same time."""

    def __init__(self, root: Path) -> None:
        self._lease = hold_lease(root)
        self.listing = list_venv(root)
        self._recent: collections.OrderedDict[int, concurrent.futures.Future[bytes]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def wait(self, chunk: int, _timeout_s: float) -> bytes:
        with self._lock:
            future = self._recent.get(chunk)
            is_mine = future is None
            if future is None:
                future = self._recent[chunk] = concurrent.futures.Future()
                while len(self._recent) > _RECENT_CHUNKS:
                    self._recent.popitem(last=False)
        if is_mine:
            try:
                future.set_result(read_chunk(self.listing, chunk))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def close(self) -> None:
        self._lease.release()


class _Upstream:
    """The nodes above, asked for chunks a few ahead. One that cannot give a chunk is not asked again."""

    def __init__(self, above: Sequence[Above]) -> None:
        self._above = list(above)
        self._lock = threading.Lock()

    def fetch(self, key: str, wanted: Sequence[int], keep: Callable[[int, bytes], None]) -> Generator[bytes]:
        """Every wanted chunk, raw, in order; each as it came goes to `keep` before.

        They are awaited, checked and decompressed by as many threads as there are chunks under way.

        Raises:
            BroadcastError: no node has a chunk whole.
        """
        rest = iter(wanted)
        with concurrent.futures.ThreadPoolExecutor(_WINDOW) as threads:

            def ask(chunk: int) -> concurrent.futures.Future[bytes]:
                return threads.submit(self._take, key, chunk, *self._ask(key, chunk), keep)

            asked = collections.deque(ask(chunk) for chunk in itertools.islice(rest, _WINDOW))
            while asked:
                yield asked.popleft().result()
                asked.extend(ask(chunk) for chunk in itertools.islice(rest, 1))

    def _ask(self, key: str, chunk: int) -> tuple[Above, ray.ObjectRef[bytes | None]]:
        with self._lock:
            if not self._above:
                raise BroadcastError(f"chunk {chunk} of a venv cannot come: no node above has the whole venv.")
            nearest = self._above[0]
        return nearest, nearest.host.chunk.remote(key, chunk)

    def _take(
        self,
        key: str,
        chunk: int,
        node: Above,
        reference: ray.ObjectRef[bytes | None],
        keep: Callable[[int, bytes], None],
    ) -> bytes:
        while True:
            try:
                data = ray.get(reference, timeout=2 * _PATIENCE_S)
                if data is not None:
                    raw = decode_chunk(data)
                    keep(chunk, data)
                    return raw
                reason = "it does not have it"
            except (ray.exceptions.RayError, BroadcastError) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
            logger.warning("chunk %d of a venv did not come from %s: %s", chunk, node.node, reason)
            with self._lock:
                if node in self._above:
                    self._above.remove(node)
                if not self._above:
                    raise BroadcastError(f"chunk {chunk} of a venv did not come from {node.node}: {reason}")
            node, reference = self._ask(key, chunk)
