"""The nodes and GPUs (or CPUs) that a job reserves on a Ray cluster, and the Pythons that its workers run in.

::

    RayVirtualCluster([2, 2])              bundles, in rank order        Ray nodes
      one placement group ───────────┬──── node 0: bundle 0, bundle 1 ── A
      (all of it or nothing)         └──── node 1: bundle 2, bundle 3 ── B
"""

from __future__ import annotations

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
from nemo_rl.distributed.bundles import Bundle, ordered_bundles
from nemo_rl.distributed.cluster import placement
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.distributed.cluster.ports import free_ports_on_nodes
from nemo_rl.distributed.cluster.session import can_grow, init_ray
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.errors import ClusterError, ConfigError, ResourceInsufficientError

__all__ = ["PY_EXECUTABLES", "Bundle", "RayVirtualCluster", "ResourceInsufficientError", "alive_nodes", "init_ray"]

logger = logging.getLogger(__name__)

# Ray commits a placement group that fits within milliseconds; one that takes this long lost a race for its resources.
_COMMIT_TIMEOUT_S = 15.0
_POLL_INTERVAL_S = 0.2


class RayVirtualCluster:
    """A job's share of the Ray cluster: so many bundles (ranks) on so many nodes.

    A bundle is one CPU, and one GPU with `use_gpus`. All bundles of a node are on one Ray node. They are reserved
    together, as one placement group, when they are first needed, so that venvs can be made ready while no GPU is
    held; a request that this Ray cluster can never serve already fails in the constructor.

    Args:
        bundle_ct_per_node_list: how many bundles on each node.
        use_gpus: whether a bundle has a GPU.
        max_colocated_worker_groups: how many worker groups share the bundles; see `worker_share`.
        num_gpus_per_node: how many GPUs a node of the Ray cluster has.
        name: for messages and for Ray's tools.
        placement_group_strategy: `SPREAD` puts the job's nodes on different Ray nodes while there are any,
            `STRICT_SPREAD` always; `PACK` uses as few Ray nodes as possible, `STRICT_PACK` one.
        port_range_low: the first port that `get_available_*` may return.
        port_range_high: the last one; both or neither.

    Raises:
        ConfigError: (a `ValueError`) an argument or `NRL_VIRTUAL_CLUSTER_MAX_RETRIES` makes no sense.
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
        self._placement_group: PlacementGroup | None = None
        self._bundles: list[Bundle] | None = None
        # Who works on which bundles; a group that nobody holds any more is gone, and so are its workers.
        self._tenants: weakref.WeakKeyDictionary[object, tuple[str, list[int]]] = weakref.WeakKeyDictionary()
        self._moving = threading.Lock()  # groups start in threads of their own
        self._promised_ports: dict[str, set[int]] = {}  # by address
        self._is_shut_down = False
        if ray.is_initialized():
            self._refuse_the_impossible(alive_nodes())

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
        """How many bundles each of the job's nodes has."""
        return list(self._bundle_counts)

    @property
    def worker_share(self) -> dict[str, float]:
        """What a worker takes of its bundle, as Ray actor options: 1/`max_colocated_worker_groups` of it.

        Rounded down to Ray's resolution of 1/10000, so that all groups fit.
        """
        share = int(10_000 / self.max_colocated_worker_groups) / 10_000
        return {"num_cpus": share, "num_gpus": share if self.use_gpus else 0.0}

    def move_in(self, tenant: object, label: str, bundles: list[int]) -> None:
        """A worker group is about to start one worker on each of `bundles` (indices in rank order).

        Raises:
            ResourceInsufficientError: all shares of one of them are taken, so that its worker would wait without end.
        """
        with self._moving:
            self._refuse_full_bundles(label, bundles)
            self._tenants[tenant] = (label, bundles)

    def _refuse_full_bundles(self, label: str, bundles: list[int]) -> None:
        for index in bundles:
            others = [name for name, taken in self._tenants.values() for bundle in taken if bundle == index]
            wanted = bundles.count(index)
            if len(others) + wanted > self.max_colocated_worker_groups:
                taken = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'}" if others else "nobody has"
                raise ResourceInsufficientError(
                    f"{self!r} has max_colocated_worker_groups={self.max_colocated_worker_groups}: {label} asks for "
                    f"{wanted} of bundle {index}'s shares, and {taken} a worker there. Raise it, or shut a group down."
                )

    def move_out(self, tenant: object) -> None:
        """The group's workers have ended. May be called again."""
        with self._moving:
            self._tenants.pop(tenant, None)

    def world_size(self) -> int:
        """How many bundles (ranks) there are."""
        return sum(self._bundle_counts)

    def node_count(self) -> int:
        """How many nodes the job asked for."""
        return len(self._bundle_counts)

    def get_placement_groups(self) -> list[PlacementGroup]:
        """The placement groups that hold the bundles: one for the whole cluster. Reserves it at the first call.

        Raises:
            ResourceInsufficientError: it cannot be reserved, after `NRL_VIRTUAL_CLUSTER_MAX_RETRIES` tries.
        """
        return [self._reserve()]

    def bundles(self) -> list[Bundle]:
        """All bundles in rank order: by node, then by GPU id. Reserves them at the first call."""
        if self._bundles is None:
            self._bundles = ordered_bundles(self._reserve(), self._bundle_counts, self.use_gpus)
        return list(self._bundles)

    def get_available_address_and_port(self, pg_idx: int, bundle_idx: int) -> tuple[str, int]:
        """The IP address of a bundle's node, and a TCP port that is free there."""
        return self.get_available_addresses_and_ports_batch([(pg_idx, bundle_idx)])[0]

    def get_available_addresses_and_ports_batch(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
        """An address and a free port for each (placement group index, bundle index); no two are equal.

        Every node looks for its own ports, all nodes at once. A port is never returned twice by one virtual cluster.

        Raises:
            ConfigError: there is no such bundle.
            ClusterError: a node has no free port in the range.
        """
        by_place = {bundle.bundle_idx: bundle for bundle in self.bundles()}
        # By address, not by node: simulated nodes on one machine share its ports.
        wanted: dict[str, list[int]] = {}
        node_at: dict[str, str] = {}
        for position, (pg_idx, bundle_idx) in enumerate(pairs):
            if pg_idx != 0 or bundle_idx not in by_place:
                raise ConfigError(
                    f"there is no bundle {bundle_idx} in placement group {pg_idx}: this cluster has one placement "
                    f"group, 0, with bundles 0 to {self.world_size() - 1}."
                )
            bundle = by_place[bundle_idx]
            wanted.setdefault(bundle.address, []).append(position)
            node_at.setdefault(bundle.address, bundle.node_id)
        found = free_ports_on_nodes(
            {
                node_at[address]: (len(positions), *self._port_range, self._promised_ports.get(address, set()))
                for address, positions in wanted.items()
            }
        )
        result: list[tuple[str, int]] = [("", 0)] * len(pairs)
        for address, positions in wanted.items():
            ports = found[node_at[address]]
            self._promised_ports.setdefault(address, set()).update(ports)
            for position, port in zip(positions, ports, strict=True):
                result[position] = (address, port)
        return result

    def get_master_address_and_port(self) -> tuple[str, int]:
        """The address of rank 0's node and a port that is free there: a new one with each call."""
        return self.get_available_address_and_port(0, self.bundles()[0].bundle_idx)

    def shutdown(self) -> bool:
        """Give all resources back. May be called again; true when nothing is reserved any more."""
        self._is_shut_down = True
        group, self._placement_group, self._bundles = self._placement_group, None, None
        if group is not None and ray.is_initialized():
            remove_placement_group(group)
        return True

    # --- reserving ---------------------------------------------------------------------------------------------------

    def _reserve(self) -> PlacementGroup:
        if self._is_shut_down:
            raise ClusterError(f"the virtual cluster {self._label()}was shut down; make a new one.")
        if self._placement_group is None:
            self._placement_group = self._try_to_reserve()
        return self._placement_group

    def _try_to_reserve(self) -> PlacementGroup:
        """Look for room until there is, for 1, 2, 4, ... seconds, `NRL_VIRTUAL_CLUSTER_MAX_RETRIES` times."""
        began = time.monotonic()
        for attempt in range(self._max_tries):
            deadline = time.monotonic() + 2.0**attempt
            while True:
                nodes = alive_nodes()
                self._refuse_the_impossible(nodes)
                chosen = self._plan([node.free for node in nodes])
                if chosen is not None:
                    group = self._create([nodes[index] for index in chosen])
                    if group is not None:
                        return group
                if time.monotonic() >= deadline:
                    break
                time.sleep(_POLL_INTERVAL_S)
            if attempt + 1 < self._max_tries:
                logger.warning(
                    "try %d of %d: %s Waiting for resources.",
                    attempt + 1,
                    self._max_tries,
                    self._asked_and_there(nodes),
                )
        elapsed = time.monotonic() - began
        raise ResourceInsufficientError(
            f"{self._asked_and_there(nodes)} Gave up after {self._max_tries} tries in {elapsed:.0f} s. Ask for less, "
            "add nodes, end what holds the rest (another worker group or job), or raise "
            f"{settings.VIRTUAL_CLUSTER_MAX_RETRIES.name}."
        )

    def _refuse_the_impossible(self, nodes: list[NodeResources]) -> None:
        if not can_grow() and self._plan([node.total for node in nodes]) is None:
            raise ResourceInsufficientError(
                f"{self._asked_and_there(nodes)} A local Ray cluster does not grow: ask for less, or set RAY_ADDRESS "
                "to a cluster that is large enough."
            )

    def _plan(self, resources: Sequence[Mapping[str, float]]) -> list[int] | None:
        capacities = [placement.capacity(available, self._bundle) for available in resources]
        return placement.plan(capacities, self._bundle_counts, self._strategy)

    def _create(self, nodes: list[NodeResources]) -> PlacementGroup | None:
        """Reserve the bundles on exactly these nodes, or nothing if somebody was faster."""
        pins = [node for node, count in zip(nodes, self._bundle_counts, strict=True) for _ in range(count)]
        group = placement_group(
            [self._bundle] * len(pins),
            strategy="PACK",
            name=f"{self.name or 'nemo_rl'}-{secrets.token_hex(4)}",
            bundle_label_selector=[{"ray.io/node-id": node.node_id} for node in pins],
        )
        if group.wait(timeout_seconds=_COMMIT_TIMEOUT_S):
            return group
        remove_placement_group(group)
        return None

    def _label(self) -> str:
        return f"{self.name!r} " if self.name else ""

    def _asked_and_there(self, nodes: list[NodeResources]) -> str:
        def show(node: NodeResources) -> str:
            return ", ".join(
                f"{node.free.get(name, 0.0):g} of {node.total.get(name, 0.0):g} {name} free" for name in self._bundle
            )

        each = " and ".join(f"{amount:g} {name}" for name, amount in self._bundle.items())
        there = "; ".join(f"{node.address}: {show(node)}" for node in nodes) or "none"
        return (
            f"the virtual cluster {self._label()}asks for {self.node_count()} node(s) with {self._bundle_counts} "
            f"bundles of {each} ({self._strategy}); the Ray cluster has {len(nodes)} alive node(s): {there}."
        )


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
