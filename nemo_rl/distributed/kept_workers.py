"""Keeps idle Ray actors of this process for the next call that needs the same one.

The actors hold no CPUs and no GPUs, only memory. They are few, and each is killed after a while without work, when a
virtual cluster is created, and, by Ray, when this process ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from nemo_rl import settings


@dataclass(frozen=True)
class _Kept:
    key: Hashable
    node_id: str
    handle: ActorHandle
    until: float


class KeptWorkers:
    """Holds idle actors. Thread-safe.

    Example::

        workers = KeptWorkers()
        handle = workers.take(key, node_id) or Actor.remote()
        ...
        workers.keep(key, node_id, handle)
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: list[_Kept] = []  # the longest idle one first
        self._session = ""
        self._timer: threading.Timer | None = None

    def keep(self, key: Hashable, node_id: str, handle: ActorHandle) -> None:
        """Keep an idle actor, and kill those that have waited longest if there are too many.

        Args:
            key: must be equal only for actors that can replace each other.
            node_id: the node that the actor runs on.
            handle: the actor. It is killed if no actors are to be kept.
        """
        with self._lock:
            self._drop_other_sessions()
            idle_s = settings.KEEP_STAGE_WORKERS_S.get()
            self._kept.append(_Kept(key, node_id, handle, time.monotonic() + idle_s))
            while len(self._kept) > settings.KEEP_STAGE_WORKERS.get():
                _kill(self._kept.pop(0))
            self._schedule()

    def take(self, key: Hashable, node_id: str) -> ActorHandle | None:
        """Return an actor with this key on the node, the one that was kept last; None if there is none.

        Its process may have died. It is no longer kept.
        """
        with self._lock:
            self._drop_other_sessions()
            for index in reversed(range(len(self._kept))):
                if (self._kept[index].key, self._kept[index].node_id) == (key, node_id):
                    return self._kept.pop(index).handle
        return None

    def release(self) -> None:
        """Kill all kept actors."""
        with self._lock:
            self._drop_other_sessions()
            for kept in self._kept:
                _kill(kept)
            self._kept = []
            self._schedule()

    def __len__(self) -> int:
        with self._lock:
            self._drop_other_sessions()
            return len(self._kept)

    def _drop_other_sessions(self) -> None:
        """Forget the actors of earlier Ray sessions, which have ended with them."""
        session = ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""
        session += ray.get_runtime_context().gcs_address if session else ""
        if session != self._session:
            self._session, self._kept = session, []

    def _expire(self) -> None:
        with self._lock:
            self._drop_other_sessions()
            now = time.monotonic()
            for kept in [kept for kept in self._kept if kept.until <= now]:
                self._kept.remove(kept)
                _kill(kept)
            self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._kept:
            seconds = max(0.0, min(kept.until for kept in self._kept) - time.monotonic())
            self._timer = threading.Timer(seconds, self._expire)
            self._timer.daemon = True
            self._timer.start()


def _kill(kept: _Kept) -> None:
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(kept.handle)


STAGE_WORKERS = KeptWorkers()
"""The workers of pipeline stages."""
