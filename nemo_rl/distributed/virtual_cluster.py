"""The nodes and GPUs (or CPUs) that a job reserves on a Ray cluster. Also exports `PY_EXECUTABLES` and `init_ray`.

::

    RayVirtualCluster([2, 2])              bundles, in rank order        Ray nodes
      one placement group ───────────┬──── node 0: bundle 0, bundle 1 ── A
      (all bundles or none)          └──── node 1: bundle 2, bundle 3 ── B
"""

from __future__ import annotations

import gc
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from nemo_rl import settings
from nemo_rl.distributed.cluster import placement
from nemo_rl.distributed.cluster.bundles import Bundle, ordered_bundles
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.distributed.cluster.ports import Block
from nemo_rl.distributed.cluster.reservations import Reservation, held_reservations
from nemo_rl.distributed.cluster.session import can_grow, init_ray
from nemo_rl.distributed.kept_workers import STAGE_WORKERS
from nemo_rl.distributed.provisioning.remote_calls import free_ports_on_nodes
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.errors import ClusterError, ConfigError, ResourceInsufficientError
from nemo_rl.utils.interactive import is_interactive, names_of

__all__ = ["PY_EXECUTABLES", "Bundle", "RayVirtualCluster", "ResourceInsufficientError", "alive_nodes", "init_ray"]

logger = logging.getLogger(__name__)

# Ray commits a placement group that fits within milliseconds. If it takes this long, another job took the resources.
_COMMIT_TIMEOUT_S = 15.0
_POLL_INTERVAL_S = 0.2

# Clusters of this process whose ports may be in use, and the lock for assigning ports.
_with_ports: weakref.WeakSet[RayVirtualCluster] = weakref.WeakSet()
_ports_lock = threading.Lock()


class RayVirtualCluster:
    """Reserves a job's bundles (ranks) on the nodes of a Ray cluster.

    A bundle is one CPU, plus one GPU with `use_gpus`. All bundles of a node of the job are on one Ray node. They are
    reserved together, as one placement group, when they are first needed, so that no GPU is held while venvs are built.
    A request that this Ray cluster can never serve fails in the constructor.

    `shutdown` releases the reservation, and so does the deletion of this object: keep it while its placement groups are
    used. A `RayWorkerGroup` keeps its cluster.

    Example::

        init_ray()
        with RayVirtualCluster([2, 2], use_gpus=False, name="rollout") as cluster:
            cluster.world_size()  # 4
            [bundle.node_idx for bundle in cluster.bundles()]  # [0, 0, 1, 1]
            cluster.get_master_address_and_port()  # ("127.0.0.1", 41231)

    Args:
        bundle_ct_per_node_list: the number of bundles on each node.
        use_gpus: whether each bundle has a GPU.
        max_colocated_worker_groups: how many worker groups share the bundles; see `worker_share`.
        num_gpus_per_node: the number of GPUs of a node of the Ray cluster.
        name: shown in messages and in Ray's tools.
        placement_group_strategy: `SPREAD` puts the job's nodes on different Ray nodes while there are enough,
            `STRICT_SPREAD` always; `PACK` uses as few Ray nodes as possible, `STRICT_PACK` exactly one.
        port_range_low: the first port that `get_available_*` and `get_master_*` may return.
        port_range_high: the last such port. Give both or neither. By default, ports come from a range in which the
            kernel gives no port to client sockets; see `nemo_rl.distributed.cluster.ports`.

    Raises:
        ConfigError: (a `ValueError`) an argument or `NRL_VIRTUAL_CLUSTER_MAX_RETRIES` is invalid.
        ResourceInsufficientError: the local Ray cluster is too small.
    """

    def __init__(
        self,
        bundle_ct_per_node_list: list[int],
        use_gpus: bool = True,
        max_colocated_worker_groups: int = 1,
        num_gpus_per_node: int = 8,
        name: str = "",
        placement_group_strategy: str = "SPREAD",
        port_range_low: int | None = None,
        port_range_high: int | None = None,
    ) -> None:
        self._bundle_counts = _checked_bundle_counts(bundle_ct_per_node_list)
        self.use_gpus = use_gpus
        self.max_colocated_worker_groups = _positive("max_colocated_worker_groups", max_colocated_worker_groups)
        self.num_gpus_per_node = _positive("num_gpus_per_node", num_gpus_per_node)
        self.name = name
        if placement_group_strategy not in placement.STRATEGIES:
            raise ConfigError(
                f"placement_group_strategy is {placement_group_strategy!r}; expected one of "
                f"{', '.join(placement.STRATEGIES)}."
            )
        if use_gpus and max(self._bundle_counts) > num_gpus_per_node:
            raise ConfigError(
                f"bundle_ct_per_node_list={self._bundle_counts} asks for more GPUs on a node than num_gpus_per_node="
                f"{num_gpus_per_node}. Ask for more nodes, or raise num_gpus_per_node."
            )
        self._strategy = placement_group_strategy
        self._port_range = _checked_port_range(port_range_low, port_range_high)
        self._max_tries = settings.VIRTUAL_CLUSTER_MAX_RETRIES.get()
        self._bundle: dict[str, float] = {"GPU": 1.0, "CPU": 1.0} if use_gpus else {"CPU": 1.0}
        self._reservation: Reservation | None = None
        self._bundles: list[Bundle] | None = None
        self._reserving = threading.RLock()  # held while resources are reserved
        # Worker group -> its label and bundles. Weak: the workers of a group without references end with it.
        self._groups: weakref.WeakKeyDictionary[object, tuple[str, list[int]]] = weakref.WeakKeyDictionary()
        self._groups_lock = threading.Lock()  # groups start in separate threads
        self._assigned_ports: dict[str, set[int]] = {}  # by address
        self._is_shut_down = False
        if ray.is_initialized():
            self._check_possible(alive_nodes())

    def __enter__(self) -> RayVirtualCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        kind = "GPU" if self.use_gpus else "CPU"
        return (
            f"RayVirtualCluster({self._label()}{len(self._bundle_counts)} nodes, {self._bundle_counts} {kind} bundles)"
        )

    @property
    def bundle_counts(self) -> list[int]:
        """The number of bundles of each of the job's nodes."""
        return list(self._bundle_counts)

    @property
    def worker_share(self) -> dict[str, float]:
        """The part of its bundle that a worker takes, as Ray actor options: 1/`max_colocated_worker_groups`.

        It is rounded down to Ray's resolution of 1/10000, so that all groups fit.
        """
        share = int(10_000 / self.max_colocated_worker_groups) / 10_000
        return {"num_cpus": share, "num_gpus": share if self.use_gpus else 0.0}

    def add_group(self, group: object, label: str, bundles: list[int]) -> None:
        """Register a worker group before it starts one worker on each of `bundles` (indices in rank order).

        Raises:
            ResourceInsufficientError: all shares of a bundle are taken, so that a worker would wait forever.
        """
        with self._groups_lock:
            conflict = self._conflict(label, bundles)
            if conflict:
                gc.collect()  # an error of Ray refers to its own traceback, which may hold a group without a name
                conflict = self._conflict(label, bundles)
            if conflict:
                raise ResourceInsufficientError(conflict)
            self._groups[group] = (label, bundles)

    def _conflict(self, label: str, bundles: list[int]) -> str:
        """Return a message if a bundle has too few free shares; empty if there are enough."""
        for index in bundles:
            others = [group for group, (_, taken) in self._groups.items() for bundle in taken if bundle == index]
            wanted = bundles.count(index)
            if len(others) + wanted > self.max_colocated_worker_groups:
                holders = ", ".join(f"{self._groups[group][0]}{_held_by(group)}" for group in others) or "none"
                return (
                    f"{self!r} has max_colocated_worker_groups={self.max_colocated_worker_groups}: {label} asks for "
                    f"{wanted} of bundle {index}'s shares; groups with a worker there: {holders}. "
                    "Raise the limit, or shut a group down."
                )
        return ""

    def remove_group(self, group: object) -> None:
        """Unregister a worker group whose workers have ended. A repeated call has no effect."""
        with self._groups_lock:
            self._groups.pop(group, None)

    def world_size(self) -> int:
        """Return the number of bundles (ranks)."""
        return sum(self._bundle_counts)

    def node_count(self) -> int:
        """Return the number of nodes that the job has requested."""
        return len(self._bundle_counts)

    def get_placement_groups(self) -> list[PlacementGroup]:
        """Return the placement groups of the bundles: one for the whole cluster. The first call reserves it.

        Raises:
            ResourceInsufficientError: it could not be reserved in `NRL_VIRTUAL_CLUSTER_MAX_RETRIES` attempts.
        """
        return [self._reserve()]

    def bundles(self) -> list[Bundle]:
        """Return all bundles in rank order: by node, then by GPU id. The first call reserves them."""
        with self._reserving:
            group = self._reserve()
            if self._bundles is None:
                self._bundles = ordered_bundles(group, self._bundle_counts, self.use_gpus)
            return list(self._bundles)

    def get_available_address_and_port(self, pg_idx: int, bundle_idx: int) -> tuple[str, int]:
        """Return the IP address of a bundle's node and a free TCP port of that node."""
        return self.get_available_addresses_and_ports_batch([(pg_idx, bundle_idx)])[0]

    def get_available_addresses_and_ports_batch(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
        """Return a distinct address and free port for each (placement group index, bundle index).

        The nodes search their ports in parallel. A virtual cluster never returns a port twice, nor one that another
        virtual cluster of this process has returned and may still use.

        Raises:
            ConfigError: a bundle does not exist.
            ClusterError: a node has no free port in the range.
        """
        return self.assign_ports(pairs, "engines")

    def assign_ports(self, pairs: Sequence[tuple[int, int]], block: Block) -> list[tuple[str, int]]:
        """Return addresses and ports as `get_available_addresses_and_ports_batch` does, from a block of ports."""
        by_index = {bundle.bundle_idx: bundle for bundle in self.bundles()}
        # By address, not by node: simulated nodes on one machine share its ports.
        positions_at: dict[str, list[int]] = {}
        node_at: dict[str, str] = {}
        for position, (pg_idx, bundle_idx) in enumerate(pairs):
            if pg_idx != 0 or bundle_idx not in by_index:
                raise ConfigError(
                    f"there is no bundle {bundle_idx} in placement group {pg_idx}: this cluster has one placement "
                    f"group, 0, with bundles 0 to {self.world_size() - 1}."
                )
            bundle = by_index[bundle_idx]
            positions_at.setdefault(bundle.address, []).append(position)
            node_at.setdefault(bundle.address, bundle.node_id)
        with _ports_lock:
            _with_ports.add(self)
            taken = {
                address: set[int]().union(*(other._assigned_ports.get(address, ()) for other in _with_ports))
                for address in positions_at
            }
            ports_of_node = free_ports_on_nodes(
                {
                    node_at[address]: (len(positions), *self._port_range, taken[address])
                    for address, positions in positions_at.items()
                },
                block,
            )
            for address in positions_at:
                self._assigned_ports.setdefault(address, set()).update(ports_of_node[node_at[address]])
        result: list[tuple[str, int]] = [("", 0)] * len(pairs)
        for address, positions in positions_at.items():
            for position, port in zip(positions, ports_of_node[node_at[address]], strict=True):
                result[position] = (address, port)
        return result

    def get_master_address_and_port(self) -> tuple[str, int]:
        """Return the address of rank 0's node and a free port of that node, a different one with each call."""
        return self.assign_ports([(0, self.bundles()[0].bundle_idx)], "master")[0]

    def shutdown(self) -> bool:
        """Release all resources. Returns True once nothing is reserved; a repeated call has no effect.

        A call that waits for resources in another thread ends with `ClusterError`. If Ray cannot be reached, this
        raises Ray's error, and may be called again.
        """
        self._is_shut_down = True
        if self._reservation is not None:
            self._reservation.release()
        self._reservation = self._bundles = None
        _with_ports.discard(self)
        return True

    # --- reserving ---------------------------------------------------------------------------------------------------

    def _reserve(self) -> PlacementGroup:
        with self._reserving:
            self._check_not_shut_down()
            reservation = self._reservation
            if reservation is None:
                reservation = self._reservation = Reservation(self, self._try_to_reserve(), repr(self))
            if self._is_shut_down:  # while this thread waited
                reservation.release()
                self._check_not_shut_down()
            return reservation.placement_group

    def _check_not_shut_down(self) -> None:
        if self._is_shut_down:
            raise ClusterError(f"the virtual cluster {self._label()}was shut down; create a new one.")

    def _try_to_reserve(self) -> PlacementGroup:
        """Wait for free resources, for 1, 2, 4, ... seconds in `NRL_VIRTUAL_CLUSTER_MAX_RETRIES` attempts.

        A notebook or prompt does not wait for what its own process holds.
        """
        STAGE_WORKERS.release()  # they hold no CPUs, but the memory of their processes
        start_time = time.monotonic()
        for attempt in range(self._max_tries):
            deadline = time.monotonic() + 2.0**attempt
            while True:
                self._check_not_shut_down()
                nodes = alive_nodes()
                self._check_possible(nodes)
                chosen = self._plan([node.free for node in nodes])
                if chosen is not None:
                    group = self._create([nodes[index] for index in chosen])
                    if group is not None:
                        return group
                elif is_interactive() and not can_grow():
                    self._check_not_held_here(nodes)
                if time.monotonic() >= deadline:
                    break
                time.sleep(_POLL_INTERVAL_S)
            gc.collect()  # as in `add_group`
            if attempt + 1 < self._max_tries:
                logger.warning(
                    "attempt %d of %d: %s %sWaiting for resources.",
                    attempt + 1,
                    self._max_tries,
                    self._describe_request(nodes),
                    _describe_held(),
                )
        elapsed = time.monotonic() - start_time
        nodes = alive_nodes()  # a busy head may have reported old numbers before the last try
        raise ResourceInsufficientError(
            f"{self._describe_request(nodes)} {_describe_held()}Gave up after {self._max_tries} attempts in "
            f"{elapsed:.0f} s. Request less, add nodes, end the worker groups or jobs that hold the resources, or "
            f"raise {settings.VIRTUAL_CLUSTER_MAX_RETRIES.name}."
        )

    def _check_possible(self, nodes: list[NodeResources]) -> None:
        if not can_grow() and self._plan([node.total for node in nodes]) is None:
            raise ResourceInsufficientError(
                f"{self._describe_request(nodes)} A local Ray cluster does not grow: request less, or set RAY_ADDRESS "
                "to a cluster that is large enough."
            )

    def _check_not_held_here(self, nodes: list[NodeResources]) -> None:
        """Raise if the other clusters of this process leave too little. A cell that waits releases nothing."""
        if self._fits_beside_held(nodes):
            return
        gc.collect()  # as in `add_group`
        if not self._fits_beside_held(nodes):
            raise ResourceInsufficientError(f"{self._describe_request(nodes)} {_describe_held()}".strip())

    def _fits_beside_held(self, nodes: list[NodeResources]) -> bool:
        held = _amounts_held()
        left = [  # a local Ray cluster has one node
            {name: node.total.get(name, 0.0) - held.get(name, 0.0) for name in self._bundle} for node in nodes
        ]
        return self._plan(left) is not None

    def _plan(self, resources: Sequence[Mapping[str, float]]) -> list[int] | None:
        capacities = [placement.capacity(available, self._bundle) for available in resources]
        return placement.plan(capacities, self._bundle_counts, self._strategy)

    def _create(self, nodes: list[NodeResources]) -> PlacementGroup | None:
        """Reserve the bundles on exactly these nodes. Returns None if another job took the resources first."""
        pins = [node for node, count in zip(nodes, self._bundle_counts, strict=True) for _ in range(count)]
        group = placement_group(
            [self._bundle] * len(pins),
            strategy="PACK",
            name=f"{self.name or 'nemo_rl'}-{secrets.token_hex(4)}",
            bundle_label_selector=[{"ray.io/node-id": node.node_id} for node in pins],
        )
        is_committed = False
        try:
            is_committed = group.wait(timeout_seconds=_COMMIT_TIMEOUT_S)
        finally:
            if not is_committed:
                remove_placement_group(group)
        return group if is_committed else None

    def _label(self) -> str:
        return f"{self.name!r} " if self.name else ""

    def _describe_request(self, nodes: list[NodeResources]) -> str:
        def show(node: NodeResources) -> str:
            return ", ".join(
                f"{node.free.get(name, 0.0):g} of {node.total.get(name, 0.0):g} {name} free" for name in self._bundle
            )

        each = " and ".join(f"{amount:g} {name}" for name, amount in self._bundle.items())
        node_list = "; ".join(f"{node.address}: {show(node)}" for node in nodes) or "none"
        return (
            f"the virtual cluster {self._label()}requests {self.node_count()} node(s) with {self._bundle_counts} "
            f"bundles of {each} ({self._strategy}); the Ray cluster has {len(nodes)} alive node(s): {node_list}."
        )


def _amounts_held() -> dict[str, float]:
    """Return the resources that clusters of this process hold.

    A function, so that the traceback of an error refers to no cluster: notebooks keep the last one.
    """
    amounts: dict[str, float] = {}
    for reservation in held_reservations():
        cluster = reservation.owner
        if isinstance(cluster, RayVirtualCluster):
            for name, amount in cluster._bundle.items():
                amounts[name] = amounts.get(name, 0.0) + amount * cluster.world_size()
    return amounts


def _describe_held() -> str:
    held = ", ".join(
        sorted(f"{one.description}{_held_by(one.owner)}" for one in held_reservations() if one.owner is not None)
    )
    return f"This process itself holds resources: {held}; `shutdown()` releases them. " if held else ""


def _held_by(owner: object) -> str:
    """Return the global names of the user's script or notebook that refer to a cluster or group, for messages."""
    groups = list(owner._groups) if isinstance(owner, RayVirtualCluster) else []
    names = [name for one in (owner, *groups) for name in names_of(one)]
    return f" (held by {', '.join(map(repr, names))})" if names else ""


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a positive integer.")
    return value


def _checked_bundle_counts(counts: Sequence[int]) -> list[int]:
    if isinstance(counts, str) or not isinstance(counts, Sequence) or not counts:
        raise ConfigError(f"bundle_ct_per_node_list is {counts!r}; expected one positive integer per node.")
    return [_positive(f"bundle_ct_per_node_list[{index}]", count) for index, count in enumerate(counts)]


def _checked_port_range(low: int | None, high: int | None) -> tuple[int | None, int | None]:
    if low is None and high is None:
        return None, None
    if low is None or high is None or not 0 < low <= high < 65536:
        raise ConfigError(
            f"port_range_low={low} and port_range_high={high}: expected both or neither, from 1 to 65535, low first."
        )
    return low, high
