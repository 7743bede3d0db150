"""Reserves CPUs for workers that do not hold any themselves.

A Ray actor holds its CPUs until it ends. A worker that is kept for a later run must not: it would block the rest of the
cluster while it is idle. It is therefore an actor without CPUs, and each run reserves CPUs for it on its node by a
placement group, which needs no process.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)


@dataclass(eq=False)
class Lease:
    """A reservation of CPUs on one node.

    Attributes:
        num_cpus: number of CPUs.
        group: Ray's reservation.
        node_id: the node; None while the request waits for free CPUs.
    """

    num_cpus: float
    group: PlacementGroup
    node_id: str | None = None


class Leases:
    """Manages the leases of one run. A lease that a worker returns can go to the next worker without a request to Ray.

    Every lease must be given back or discarded, and `close_free` be called at the end.
    """

    def __init__(self) -> None:
        self._free: list[Lease] = []

    def request(self, num_cpus: float) -> Lease:
        """Ask for CPUs, without waiting for them. See `is_granted`."""
        return Lease(num_cpus, placement_group([{"CPU": num_cpus}]))

    def is_granted(self, lease: Lease) -> bool:
        """Return whether a lease has its CPUs. Gives it those of a lease that was returned, if it still waits."""
        if lease.node_id is None:
            state = placement_group_table(lease.group)
            if state.get("state") == "CREATED":
                (lease.node_id,) = state["bundles_to_node_id"].values()
        if lease.node_id is None:
            free = next((free for free in self._free if free.num_cpus == lease.num_cpus), None)
            if free is not None:
                self._free.remove(free)
                remove_placement_group(lease.group)
                lease.group, lease.node_id = free.group, free.node_id
        return lease.node_id is not None

    def give_back(self, lease: Lease) -> None:
        """Return a lease. Another worker of the run may use its CPUs until `close_free` is called."""
        if lease.node_id is None:
            remove_placement_group(lease.group)
        else:
            self._free.append(lease)

    def discard(self, lease: Lease) -> None:
        """Return a lease whose worker died. Its node may have died too, so nobody else uses the lease."""
        remove_placement_group(lease.group)

    def close_free(self) -> None:
        """Return the CPUs that no worker of this run has taken to Ray."""
        for lease in self._free:
            remove_placement_group(lease.group)
        self._free = []
