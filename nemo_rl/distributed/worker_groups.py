"""Worker groups: Ray actors that run in their class's venv, on the bundles of a virtual cluster.

::

    RayWorkerGroup(cluster, RayWorkerBuilder(fqn, ...))
      │ 1 plan     venv ready on every node, class described (later starts read the description from disk)
      │ 2 reserve  the cluster's bundles and ports
      │ 3 create   all actors at once; none waits for another
      │ 4 wait     one attestation per worker; the first failure kills the group and is raised
      ▼
    run_all_workers_*(...)

The driver never imports a worker's module (see `workers.host`). Docs: docs/worker-groups.md.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from nemo_rl.distributed.cluster.bundles import Bundle
from nemo_rl.distributed.cluster.ports import Block
from nemo_rl.distributed.futures import MultiWorkerFuture
from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.ray_private import actor_id
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.workers.builder import (
    RayWorkerBuilder,
    StartedWorkers,
    WorkerRequest,
    configure_arguments,
    prepare_venvs,
)
from nemo_rl.distributed.workers.calls import WorkerCalls
from nemo_rl.distributed.workers.launch_plan import IsolatedWorkerInitializer, LaunchPlan, make_actor_runtime_env
from nemo_rl.distributed.workers.layout import WorkerMetadata, WorkerPlacement, place_workers
from nemo_rl.distributed.workers.startup import all_dead, check_nodes_alive, kill_and_wait
from nemo_rl.errors import ConfigError, WorkerStartError
from nemo_rl.observability.activities import activity
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.interactive import assigned_name, calling_frame

__all__ = [
    "IsolatedWorkerInitializer",
    "MultiWorkerFuture",
    "RayWorkerBuilder",
    "RayWorkerGroup",
    "WorkerMetadata",
    "make_actor_runtime_env",
    "prepare_venvs",
]

logger = logging.getLogger(__name__)

_PACKAGE = __name__.partition(".")[0]

_DATA_PARALLEL = "data_parallel"
# Names of the actors of this process's groups, some of which may not have started yet.
_names_in_use: set[str] = set()
_names_lock = threading.Lock()


class RayWorkerGroup(WorkerCalls):
    """Starts workers of one class on the bundles of a virtual cluster and calls them together.

    The constructor returns when the constructors of all workers have returned. If one fails, it raises at once and
    leaves no worker running. The workers of a group without references end, after the calls that run.

    Example::

        init_ray()
        builder = RayWorkerBuilder("my_package.my_worker.MyWorker", size=3)
        with RayVirtualCluster([2], use_gpus=False) as cluster, RayWorkerGroup(cluster, builder) as group:
            results = group.get_all_worker_results(group.run_all_workers_single_data("describe"))  # one per worker

    In a notebook, a cell with `group = RayWorkerGroup(...)` can be run again: it ends the group that another run of the
    cell, or another cell, has assigned to this name.

    Args:
        cluster: where the workers run; each takes 1/`max_colocated_worker_groups` of its bundle.
        remote_worker_builder: the class, its arguments and its options.
        workers_per_node: None for one worker per bundle; an int; or one int per node.
        name_prefix: of the actors' names; by default the class's name. The actor on bundle 1 of node 0 is named
            `<name_prefix>-0-1`; if another actor has one of the group's names, all get the same random suffix.
        bundle_indices_list: tied groups, see `workers.layout.place_workers`. Only the first worker of each receives
            `bundle_indices` in its `configure_worker`.
        sharding_annotations: the ranks on named axes; required for sharded calls.
        env_vars: variables of all workers. They override all others except those that describe the group (RANK, ...).
        stopped: set it from another thread to abort the start; afterwards no worker is restarted.

    Raises:
        ConfigError: the arguments do not fit the cluster or each other.
        ResourceInsufficientError: the cluster's bundles cannot be reserved, or have no free share.
        NodeVenvError, RuntimeEnvError, UnregisteredActorError: see `workers.launch_plan.plan_launch`.
        WorkerStartError: a worker died or did not answer; contains the worker's traceback.
        NodeLostError: the node of a worker has left the cluster.
        AttestationError: a worker does not run in the venv that was prepared for it.
    """

    def __init__(
        self,
        cluster: RayVirtualCluster,
        remote_worker_builder: RayWorkerBuilder,
        workers_per_node: int | list[int] | None = None,
        name_prefix: str = "",
        bundle_indices_list: list[tuple[int, list[int]]] | None = None,
        sharding_annotations: NamedSharding | None = None,
        env_vars: dict[str, str] | None = None,
        stopped: threading.Event | None = None,
    ) -> None:
        self.cluster = cluster
        self._stopped = stopped or threading.Event()
        self.sharding_annotations = sharding_annotations
        self._builder = remote_worker_builder
        self._fqn = remote_worker_builder.ray_actor_class_fqn
        self._placements = place_workers(cluster.bundle_counts, workers_per_node, bundle_indices_list)
        if sharding_annotations is not None:
            _check_sharding(sharding_annotations, len(self._placements))
        self.label = name_prefix or self._fqn.rpartition(".")[2]
        self._workers: list[ActorHandle] = []
        self._attestation: list[dict[str, Any]] = []
        self._is_shut_down = False
        self._release_names: weakref.finalize[..., RayWorkerGroup] | None = None
        caller = calling_frame(_PACKAGE)
        self._created_by = caller.f_code if caller is not None else None
        with activity(f"group {self.label}", phase_level=logging.DEBUG) as starting:
            starting.phase("preparing its venv and class")
            plan = remote_worker_builder.plan(env_vars=env_vars)
            if caller is not None:
                self._replace_group_of(caller)
            del caller  # a frame keeps all variables of its function
            starting.phase(f"reserving {cluster.world_size()} bundles")
            self._bundles = cluster.bundles()
            starting.phase(f"starting {self.world_size} workers")
            self._start_all(plan)
            starting.result = f"{self.world_size} workers ready"

    def __enter__(self) -> RayWorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown(force=error is not None)

    def _start_all(self, plan: LaunchPlan) -> None:
        cluster = self.cluster
        [(self.master_address, self.master_port)] = self._free_ports(self._placements[:1], "master")
        self._ports = self._free_ports(self._placements, "engines")
        self._metadata = self._describe_workers()
        plan = plan.ready_on(bundle.node_id for bundle in self.bundles)
        cluster.add_group(self, self.label, [placement.bundle for placement in self._placements])
        try:
            started = self._start(plan, self._placements)
        except BaseException:
            cluster.remove_group(self)
            raise
        self._plan, self._workers, self._attestation = started.plan, started.handles, started.attestations
        self._methods = self._plan.description.methods

    def _replace_group_of(self, frame: FrameType) -> None:
        """End the group that `name` holds if `frame` assigns this one to it, in a cell that runs again.

        A cell, or a statement at a prompt, is compiled each time it runs. In a script, all statements are one code.
        """
        name = assigned_name(frame)
        previous = frame.f_globals.get(name) if name is not None else None
        if not isinstance(previous, RayWorkerGroup) or previous._is_shut_down or previous._created_by is frame.f_code:
            return
        logger.info("%s: ends %s, which %r held", self.label, previous.label, name)
        previous.shutdown(force=True)
        if previous.cluster is not self.cluster:
            del previous.cluster  # if nothing else refers to it, its bundles return

    # --- properties --------------------------------------------------------------------------------------------------

    @property
    def workers(self) -> list[ActorHandle]:
        """The actors' handles, by global rank; empty after `shutdown`."""
        return list(self._workers)

    @property
    def worker_metadata(self) -> list[WorkerMetadata]:
        """See `WorkerMetadata`; by global rank."""
        return list(self._metadata)

    @property
    def bundles(self) -> list[Bundle]:
        """The bundle of each worker, by global rank."""
        return [self._bundles[placement.bundle] for placement in self._placements]

    @property
    def attestation(self) -> list[dict[str, Any]]:
        """What each worker reported before its first task: venv digest, Python, ray, node, pid; by global rank."""
        return [dict(entry) for entry in self._attestation]

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return len(self._placements)

    @property
    def dp_size(self) -> int:
        """Number of data-parallel shards: the size of the axis "data_parallel", or else the number of tied groups."""
        if self._has_data_axis:
            assert self.sharding_annotations is not None
            return self.sharding_annotations.get_axis_size(_DATA_PARALLEL)
        return self._placements[-1].tied_group + 1

    def get_dp_leader_worker_idx(self, dp_shard_idx: int) -> int:
        """Return the rank of the first worker of a data-parallel shard. Raises `IndexError` for an unknown shard."""
        if not 0 <= dp_shard_idx < self.dp_size:
            raise IndexError(f"data-parallel shard {dp_shard_idx} does not exist: {self.label} has {self.dp_size}")
        return min(entry["global_rank"] for entry in self._metadata if entry["dp_shard_idx"] == dp_shard_idx)

    @property
    def dp_leader_worker_indices(self) -> list[int]:
        """The rank of the first worker of each data-parallel shard."""
        return [self.get_dp_leader_worker_idx(shard) for shard in range(self.dp_size)]

    @property
    def _has_data_axis(self) -> bool:
        return self.sharding_annotations is not None and _DATA_PARALLEL in self.sharding_annotations.names

    def tied_group_of(self, rank: int) -> int:
        """Return the index of the tied group that a rank belongs to."""
        return self._placements[rank].tied_group

    def rank_of_actor(self, actor: str | None) -> int | None:
        """Return the rank of the actor with this id (hex), or None if it is not a worker of this group."""
        ids = [actor_id(handle) for handle in self._workers]
        return ids.index(actor) if actor in ids else None

    def describe_worker(self, rank: int) -> str:
        """Return a worker's rank, name, node and pid, for messages."""
        text = f"rank {rank} ({self._metadata[rank]['name']})"
        if rank < len(self._attestation):
            text += f" on node {self._attestation[rank]['node_ip']}, pid {self._attestation[rank]['pid']}"
        return text

    def write_attestation(self, path: str | os.PathLike[str]) -> Path:
        """Write the attestations as JSON. `path` is a run's directory or a file; returns the file."""
        target = Path(path)
        if target.is_dir() or not target.suffix:
            target = target / f"attestation-{self.label}.json"
        write_atomically(target, json.dumps(self._attestation, indent=1))
        return target

    # --- starting ----------------------------------------------------------------------------------------------------

    def kill_workers(self, ranks: Sequence[int]) -> None:
        """Kill workers immediately, and wait until they are dead."""
        kill_and_wait([self._workers[rank] for rank in ranks])

    def replace_workers(self, ranks: Sequence[int]) -> list[int]:
        """Restart workers on their bundles, together with the workers tied to them. The other workers continue.

        The new workers receive the group's addresses, but they do not rejoin a process group of the old ones. Use this
        only for workers that share no process group beyond their tied group.

        Returns:
            The ranks that were restarted.

        Raises:
            NodeLostError: the node of one of them has left the cluster.
            WorkerStartError: one of them died or did not answer while it was starting.
            AttestationError: one of them runs in another venv, Python or ray version than planned. After any of these
                errors these workers are dead and the others continue.
        """
        self._check_not_stopped()
        tied_groups = {self._placements[rank].tied_group for rank in ranks}
        placements = [placement for placement in self._placements if placement.tied_group in tied_groups]
        replaced = [placement.rank for placement in placements]
        self.kill_workers(replaced)
        self.check_nodes_alive(replaced)
        try:
            self._refresh_ports(placements)
        except RayError as error:  # Ray notices the loss of a node only after some seconds
            self.check_nodes_alive(replaced)
            raise WorkerStartError(f"{self.label}: cannot find free ports: {error}") from error
        started = self._start(self._plan, placements)
        self._plan = started.plan
        self._methods = self._plan.description.methods
        if self._stopped.is_set():
            kill_and_wait(started.handles)
            self._check_not_stopped()
        for rank, handle, attestation in zip(replaced, started.handles, started.attestations, strict=True):
            self._workers[rank] = handle
            self._attestation[rank] = attestation
        return replaced

    def check_nodes_alive(self, ranks: Sequence[int]) -> None:
        """Raise `NodeLostError` if the node of one of these workers has left the cluster."""
        bundles = self.bundles
        check_nodes_alive((self.describe_worker(rank), bundles[rank].node_id) for rank in ranks)

    def _check_not_stopped(self) -> None:
        if self._stopped.is_set():
            raise WorkerStartError(f"{self.label} was shut down; its workers are not restarted")

    def _describe_workers(self) -> list[WorkerMetadata]:
        names = [
            f"{self.label}-{placement.node_idx}-{self._bundles[placement.bundle].local_idx}"
            for placement in self._placements
        ]
        suffix = self._claim_names(names)
        metadata: list[WorkerMetadata] = []
        for placement, name in zip(self._placements, names, strict=True):
            shard = placement.tied_group
            if self._has_data_axis:
                assert self.sharding_annotations is not None
                shard = self.sharding_annotations.get_worker_coords(placement.rank)[_DATA_PARALLEL]
            metadata.append(
                {
                    "node_idx": placement.node_idx,
                    "local_rank": placement.local_rank,
                    "global_rank": placement.rank,
                    "name": f"{name}{suffix}",
                    "bundle_indices": placement.bundle_indices,
                    "dp_shard_idx": shard,
                }
            )
        return metadata

    def _claim_names(self, names: Sequence[str]) -> str:
        """Return the suffix of the actors' names: none, or a random one if one of the names is taken."""
        with _names_lock:
            if _names_in_use.isdisjoint(names) and not any(map(_is_taken, names)):
                _names_in_use.update(names)
                self._release_names = weakref.finalize(self, _names_in_use.difference_update, names)
                return ""
        return f"-{secrets.token_hex(3)}"

    def _refresh_ports(self, placements: Sequence[WorkerPlacement]) -> None:
        for placement, port in zip(placements, self._free_ports(placements, "engines"), strict=True):
            self._ports[placement.rank] = port

    def _free_ports(self, placements: Sequence[WorkerPlacement], block: Block) -> list[tuple[str, int]]:
        groups = {id(group): index for index, group in enumerate(self.cluster.get_placement_groups())}
        bundles = [self._bundles[placement.bundle] for placement in placements]
        return self.cluster.assign_ports(
            [(groups[id(bundle.placement_group)], bundle.bundle_idx) for bundle in bundles], block
        )

    def _start(self, plan: LaunchPlan, placements: Sequence[WorkerPlacement]) -> StartedWorkers:
        """Start one worker per placement and wait for all; adds rank and name to the attestations."""
        started = self._builder.start(plan, [self._request(placement) for placement in placements], self._stopped)
        attestations = [
            {"rank": placement.rank, "name": self._metadata[placement.rank]["name"], **attestation}
            for placement, attestation in zip(placements, started.attestations, strict=True)
        ]
        return StartedWorkers(started.plan, started.handles, attestations)

    def _request(self, placement: WorkerPlacement) -> WorkerRequest:
        bundle = self._bundles[placement.bundle]
        name = self._metadata[placement.rank]["name"]
        share = self.cluster.worker_share
        return WorkerRequest(
            label=f"rank {placement.rank} ({name})",
            placement_group=bundle.placement_group,
            bundle_index=bundle.bundle_idx,
            node_id=bundle.node_id,
            ray_options={**share, "name": name},
            configure_arguments=configure_arguments(
                share["num_gpus"],
                placement.bundle_indices if placement.is_leader else None,
                self.cluster.num_gpus_per_node,
            ),
            env_vars={
                "RANK": str(placement.rank),
                "LOCAL_RANK": str(placement.local_rank),
                "WORLD_SIZE": str(len(self._placements)),
                "NODE_RANK": str(placement.node_idx),
                "MASTER_ADDR": self.master_address,
                "MASTER_PORT": str(self.master_port),
                # One entry per rank, as JSON (which is also a Python literal).
                "AVAILABLE_ADDR_LIST": json.dumps([address for address, _ in self._ports]),
                "AVAILABLE_PORT_LIST": json.dumps([port for _, port in self._ports]),
            },
        )

    # --- ending ------------------------------------------------------------------------------------------------------

    def shutdown(self, cleanup_method: str | None = None, timeout: float | None = 30.0, force: bool = False) -> bool:
        """End all workers. Does nothing if they have ended. If a call raises or leaves workers alive, call it again.

        Args:
            cleanup_method: method to call on every worker first.
            timeout: seconds for clean-up and exit together; workers that are still running then are killed. None waits
                without limit.
            force: kill immediately, without clean-up.

        Returns:
            With `force`: whether all workers are dead. Otherwise: whether the clean-up succeeded and every worker
            exited without being killed.

        Raises:
            ValueError: `timeout` is negative or not a number. The group continues.
            AttributeError: the workers have no method `cleanup_method`. The group continues.
        """
        if self._is_shut_down:
            return True
        deadline = _Deadline(timeout)
        if cleanup_method is not None and not force:
            self._check_method(cleanup_method)
        self._stopped.set()
        clean = True
        if not force:
            clean = cleanup_method is None or self._clean_up(cleanup_method, deadline)
            for handle in self._workers:
                handle.__ray_terminate__.remote()
            if not all_dead(self._workers, deadline.remaining()):
                logger.warning("%s did not end within %.0f s; killing its workers", self.label, timeout)
                clean, force = False, True
        if force and not kill_and_wait(self._workers):
            logger.warning("%s: Ray has not reported the end of all killed workers; repeat the shutdown", self.label)
            return False
        # Only now, because a group that still has workers must keep their handles and shares.
        self._is_shut_down = True
        self._workers = []
        if self._release_names is not None:
            self._release_names()
        self.cluster.remove_group(self)
        return clean

    def _clean_up(self, method: str, deadline: _Deadline) -> bool:
        references = [getattr(handle, method).remote() for handle in self._workers]
        done, late = ray.wait(references, num_returns=len(references), timeout=deadline.remaining())
        failed = 0
        for reference in done:
            try:
                ray.get(reference)
            except RayError as error:
                failed += 1
                logger.warning("%s: the clean-up method %r failed: %s", self.label, method, error)
        if late:
            logger.warning("%s: %d workers did not finish %r in %.0f s", self.label, len(late), method, deadline.limit)
        return not failed and not late


def _is_taken(name: str) -> bool:
    """Return whether Ray refuses an actor of this name. It does until this process knows that the last one has died."""
    try:
        ray.get_actor(name)
    except ValueError:
        return False
    return True


class _Deadline:
    """Measures a time limit from its creation; None is no limit."""

    def __init__(self, limit: float | None) -> None:
        valid = limit is None or (isinstance(limit, int | float) and not isinstance(limit, bool) and limit >= 0)
        if not valid:
            raise ValueError(f"timeout must be a number of seconds that is not negative, or None, got {limit!r}")
        self.limit = None if limit == math.inf else limit
        self._start = time.monotonic()

    def remaining(self) -> float | None:
        """Return the seconds that are left, at least 0, or None without a limit."""
        return None if self.limit is None else max(0.0, self._start + self.limit - time.monotonic())


def _check_sharding(sharding: NamedSharding, world_size: int) -> None:
    ranks = sorted(int(rank) for rank in sharding.layout.flat)
    if ranks != list(range(world_size)):
        raise ConfigError(
            f"sharding_annotations contain the ranks {ranks}, but the group has {world_size} workers: ranks 0 to "
            f"{world_size - 1}"
        )
