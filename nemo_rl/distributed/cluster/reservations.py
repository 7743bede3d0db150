"""The placement groups that this process holds on the Ray cluster.

::

    RayVirtualCluster ──creates──► Reservation ──shutdown──► release
           └── deleted without shutdown ──► queue ──► thread: release

The finalizer of a deleted object may run at any point of any thread, also within Ray, where a call of Ray could wait
forever. So it only puts the reservation into a queue, and a thread releases it. At the end of the process it does
nothing, because Ray then releases everything that the job holds.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from nemo_rl.distributed.cluster.session import job_name

logger = logging.getLogger(__name__)

_held: set[Reservation] = set()
_deleted: queue.SimpleQueue[Reservation] = queue.SimpleQueue()
_releasing_lock = threading.Lock()
_releasing: threading.Thread | None = None


class Reservation:
    """Holds a placement group until `release`, or until its owner is deleted.

    Args:
        owner: the object whose deletion releases the placement group.
        placement_group: a placement group of this driver.
        description: owner and resources, for messages.
    """

    def __init__(self, owner: object, placement_group: PlacementGroup, description: str) -> None:
        self.placement_group = placement_group
        self.description = description
        self._job = job_name()
        _ensure_releasing()
        self._finalizer = weakref.finalize(owner, _deleted.put, self)
        self._finalizer.atexit = False
        _held.add(self)

    @property
    def exists(self) -> bool:
        """Whether this process still is the job that made it. Ray releases everything of a job that ends."""
        return ray.is_initialized() and job_name() == self._job

    @property
    def owner(self) -> object | None:
        """The owner; None if it has been deleted or the reservation released."""
        alive = self._finalizer.peek()
        return alive[0] if alive is not None else None

    def release(self) -> None:
        """Release the resources. A repeated call has no effect."""
        if self.exists:
            remove_placement_group(self.placement_group)
        self._finalizer.detach()
        _held.discard(self)


def held_reservations() -> list[Reservation]:
    """Return the reservations that this process holds."""
    return [reservation for reservation in list(_held) if reservation.exists]


def _ensure_releasing() -> None:
    global _releasing
    with _releasing_lock:
        if _releasing is None or not _releasing.is_alive():
            _releasing = threading.Thread(target=_release_deleted, name="release reservations", daemon=True)
            _releasing.start()


def _release_deleted() -> None:
    while True:
        reservation = _deleted.get()
        try:
            if reservation.exists:
                logger.warning("releasing %s: it was deleted without shutdown", reservation.description)
            reservation.release()
        except (RayError, RuntimeError, AssertionError) as error:  # the connection to Ray has ended meanwhile
            logger.warning("cannot release %s: %s", reservation.description, error)
