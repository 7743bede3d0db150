"""Worker groups: Ray actors that each run in their class's own venv, on the bundles of a virtual cluster.

::

    RayWorkerGroup(cluster, RayWorkerBuilder(fqn, ...))
      │ 1 plan     venv ready on every node, class described (from the second time on: read from disk)
      │ 2 reserve  the cluster's bundles, ports
      │ 3 create   all actors at once; none waits for another
      │ 4 wait     one attestation per worker; the first failure kills the group and is raised
      ▼
    run_all_workers_*(...)

The driver never imports a worker's module (see worker_host). Docs: docs/worker-groups.md.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from nemo_rl.distributed.bundles import Bundle
from nemo_rl.distributed.futures import MultiWorkerFuture
from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.workers.builder import MAX_DESCRIPTIONS, RayWorkerBuilder, configure_call, keeps_changing
from nemo_rl.distributed.workers.calls import WorkerCalls
from nemo_rl.distributed.workers.launch_plan import IsolatedWorkerInitializer, LaunchPlan, configure_workers
from nemo_rl.distributed.workers.layout import Seat, WorkerMetadata, plan_seats
from nemo_rl.distributed.workers.startup import (
    StaleDescription,
    StartingWorker,
    all_dead,
    await_started,
    kill_and_wait,
    refuse_lost_nodes,
)
from nemo_rl.errors import ConfigError, WorkerError, WorkerStartError
from nemo_rl.utils.files import write_atomically

__all__ = ["IsolatedWorkerInitializer", "MultiWorkerFuture", "RayWorkerBuilder", "RayWorkerGroup", "WorkerMetadata"]

logger = logging.getLogger(__name__)

_DATA_PARALLEL = "data_parallel"


class RayWorkerGroup(WorkerCalls):
    """Workers of one class, one per bundle of a virtual cluster (or fewer), that are called together.

    The constructor returns when every worker's constructor has, and raises as soon as one fails; nothing of the group
    is running then.

    Args:
        cluster: where the workers run; each takes 1/`max_colocated_worker_groups` of its bundle.
        remote_worker_builder: the class, its arguments and its options.
        workers_per_node: None for one worker per bundle; an int; or one int per node.
        name_prefix: of the actors' names; default: the class's name.
        bundle_indices_list: tied groups, see `worker_layout.plan_seats`; only the first worker of each gets
            `bundle_indices` in its `configure_worker`.
        sharding_annotations: the ranks on named axes; needed for sharded calls.
        env_vars: of all workers; they win over everything but the variables that describe the group itself (RANK, ...).
        stopped: set it from another thread to give up a start that is under way; workers do not start anew after that.

    Raises:
        ConfigError: arguments that do not fit the cluster, or each other.
        ResourceInsufficientError, NodeVenvError, RuntimeEnvError, UnregisteredActorError: see the parts.
        WorkerStartError: a worker died or did not answer; with its own traceback. NodeLostError: its node is gone.
        AttestationError: a worker does not run in the venv that was made ready for it.
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
        self._seats = plan_seats(cluster.bundle_counts, workers_per_node, bundle_indices_list)
        if sharding_annotations is not None:
            _check_sharding(sharding_annotations, len(self._seats))
        self.label = name_prefix or self._fqn.rpartition(".")[2]
        self._workers: list[ActorHandle] = []
        self._attestation: list[dict[str, Any]] = []
        self._is_shut_down = False
        started = time.monotonic()
        plan = remote_worker_builder.plan(env_vars=env_vars)
        self._bundles = cluster.bundles()
        self._metadata = self._take_seats()
        plan = plan.serving(self._bundles[seat.bundle].node_id for seat in self._seats)
        cluster.move_in(self, self.label, [seat.bundle for seat in self._seats])
        try:
            self._plan, self._workers, self._attestation = self._start(plan, self._seats)
        except BaseException:
            cluster.move_out(self)
            raise
        self._methods = self._plan.description.methods
        logger.info("started %d workers %s in %.2f s", len(self._workers), self.label, time.monotonic() - started)

    # --- what there is -----------------------------------------------------------------------------------------------

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
        """Which bundle each worker is on; by global rank."""
        return [self._bundles[seat.bundle] for seat in self._seats]

    @property
    def attestation(self) -> list[dict[str, Any]]:
        """What each worker reported before its first task: venv digest, Python, ray, node, pid; by global rank."""
        return [dict(entry) for entry in self._attestation]

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return len(self._seats)

    @property
    def dp_size(self) -> int:
        """Number of data-parallel shards: the size of the axis "data_parallel", or else the number of tied groups."""
        if self._has_data_axis:
            assert self.sharding_annotations is not None
            return self.sharding_annotations.get_axis_size(_DATA_PARALLEL)
        return self._seats[-1].tied_group + 1

    def get_dp_leader_worker_idx(self, dp_shard_idx: int) -> int:
        """The rank of the first worker of a data-parallel shard. Raises `IndexError` when there is no such shard."""
        if not 0 <= dp_shard_idx < self.dp_size:
            raise IndexError(f"data-parallel shard {dp_shard_idx} does not exist: {self.label} has {self.dp_size}")
        return min(entry["global_rank"] for entry in self._metadata if entry["dp_shard_idx"] == dp_shard_idx)

    @property
    def _has_data_axis(self) -> bool:
        return self.sharding_annotations is not None and _DATA_PARALLEL in self.sharding_annotations.names

    def tied_group_of(self, rank: int) -> int:
        """The index of the tied group that a rank belongs to."""
        return self._seats[rank].tied_group

    def rank_of_actor(self, actor_id: str | None) -> int | None:
        """The rank of the actor with this id (hex); None for one that is not of this group."""
        ids = [handle._actor_id.hex() for handle in self._workers]
        return ids.index(actor_id) if actor_id in ids else None

    def describe_worker(self, rank: int) -> str:
        """A worker's rank, name and node, for messages."""
        text = f"rank {rank} ({self._metadata[rank]['name']})"
        if rank < len(self._attestation):
            text += f" on node {self._attestation[rank]['node_ip']}, pid {self._attestation[rank]['pid']}"
        return text

    def write_attestation(self, path: str | os.PathLike[str]) -> Path:
        """Keep the attestation map. `path` is a run's directory, or a file; returns the file."""
        target = Path(path)
        if target.is_dir() or not target.suffix:
            target = target / f"attestation-{self.label}.json"
        write_atomically(target, json.dumps(self._attestation, indent=1))
        return target

    # --- starting ----------------------------------------------------------------------------------------------------

    def kill_workers(self, ranks: Sequence[int]) -> None:
        """Kill workers at once, and wait until they are dead."""
        kill_and_wait([self._workers[rank] for rank in ranks])

    def replace_workers(self, ranks: Sequence[int]) -> list[int]:
        """Start workers anew on their bundles, with all that are tied to them; the others are not touched.

        The new ones are told the addresses of the group as it is, but a process group that the old ones were members of
        does not take them in: this is for workers that share nothing beyond their tied group.

        Returns:
            The ranks that were started anew.

        Raises:
            NodeLostError: a node of theirs has left the cluster. In each case they are dead, and the others go on.
            WorkerStartError: see the class.
            AttestationError: see the class.
        """
        self._refuse_stopped()
        tied_groups = {self._seats[rank].tied_group for rank in ranks}
        seats = [seat for seat in self._seats if seat.tied_group in tied_groups]
        self.kill_workers([seat.rank for seat in seats])
        self.refuse_lost_nodes([seat.rank for seat in seats])
        try:
            self._refresh_ports(seats)
        except RayError as error:  # Ray takes some seconds to notice that a node is gone; until then it looks alive
            self.refuse_lost_nodes([seat.rank for seat in seats])
            raise WorkerStartError(f"{self.label}: no free ports can be asked for: {error}") from error
        self._plan, handles, answers = self._start(self._plan, seats)
        if self._stopped.is_set():
            kill_and_wait(handles)
            self._refuse_stopped()
        for seat, handle, answer in zip(seats, handles, answers, strict=True):
            self._workers[seat.rank] = handle
            self._attestation[seat.rank] = answer
        return [seat.rank for seat in seats]

    def refuse_lost_nodes(self, ranks: Sequence[int]) -> None:
        """Raise `NodeLostError` if the node of one of these workers has left the cluster."""
        refuse_lost_nodes(
            (self.describe_worker(rank), self._bundles[self._seats[rank].bundle].node_id) for rank in ranks
        )

    def _refuse_stopped(self) -> None:
        if self._stopped.is_set():
            raise WorkerStartError(f"{self.label} was shut down; its workers do not start anew")

    def _take_seats(self) -> list[WorkerMetadata]:
        """Find a master port and one for each worker. Returns each worker's metadata."""
        (self.master_address, self.master_port), *self._ports = self._free_ports([self._seats[0], *self._seats])
        token = secrets.token_hex(3)
        metadata: list[WorkerMetadata] = []
        for seat in self._seats:
            shard = seat.tied_group
            if self._has_data_axis:
                assert self.sharding_annotations is not None
                shard = self.sharding_annotations.get_worker_coords(seat.rank)[_DATA_PARALLEL]
            metadata.append(
                {
                    "node_idx": seat.node_idx,
                    "local_rank": seat.local_rank,
                    "global_rank": seat.rank,
                    "name": f"{self.label}-{seat.node_idx}-{self._bundles[seat.bundle].local_idx}-{token}",
                    "bundle_indices": seat.bundle_indices,
                    "dp_shard_idx": shard,
                }
            )
        return metadata

    def _refresh_ports(self, seats: Sequence[Seat]) -> None:
        for seat, port in zip(seats, self._free_ports(seats), strict=True):
            self._ports[seat.rank] = port

    def _free_ports(self, seats: Sequence[Seat]) -> list[tuple[str, int]]:
        groups = {id(group): index for index, group in enumerate(self.cluster.get_placement_groups())}
        bundles = [self._bundles[seat.bundle] for seat in seats]
        return self.cluster.get_available_addresses_and_ports_batch(
            [(groups[id(bundle.placement_group)], bundle.bundle_idx) for bundle in bundles]
        )

    def _env_vars_of(self, seat: Seat) -> dict[str, str]:
        """The variables that only this worker gets."""
        return {
            "RANK": str(seat.rank),
            "LOCAL_RANK": str(seat.local_rank),
            "WORLD_SIZE": str(len(self._seats)),
            "NODE_RANK": str(seat.node_idx),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
            # One entry per rank, as JSON (which is also a Python literal).
            "AVAILABLE_ADDR_LIST": json.dumps([address for address, _ in self._ports]),
            "AVAILABLE_PORT_LIST": json.dumps([port for _, port in self._ports]),
        }

    def _start(
        self, plan: LaunchPlan, seats: Sequence[Seat]
    ) -> tuple[LaunchPlan, list[ActorHandle], list[dict[str, Any]]]:
        """Create actors and wait for them; again if the class is not what was described.

        Returns the plan that they were started by, their handles and their attestations.
        """
        for _ in range(MAX_DESCRIPTIONS):
            handles: list[ActorHandle] = []
            try:
                self._create(plan, seats, handles)
                starting = [
                    StartingWorker(
                        handle,
                        plan.fqn,
                        f"rank {seat.rank} ({self._metadata[seat.rank]['name']})",
                        plan.secrets,
                        self._bundles[seat.bundle].node_id,
                    )
                    for seat, handle in zip(seats, handles, strict=True)
                ]
                answers = await_started(starting, stopped=self._stopped)
            except StaleDescription as stale:
                logger.info("%s has changed since it was described; starting it again", plan.fqn)
                plan = plan.redescribed(stale.description)
                continue
            except BaseException:
                kill_and_wait(handles)
                raise
            attestation = [
                {"rank": seat.rank, "name": self._metadata[seat.rank]["name"], **answer}
                for seat, answer in zip(seats, answers, strict=True)
            ]
            return plan, handles, attestation
        raise WorkerError(keeps_changing(plan.fqn))

    def _create(self, plan: LaunchPlan, seats: Sequence[Seat], handles: list[ActorHandle]) -> None:
        """Create one actor per seat; its handle is in `handles` at once, so that it can be killed whatever happens."""
        share = self.cluster.worker_share
        calls = [
            configure_call(
                share["num_gpus"], seat.bundle_indices if seat.is_leader else None, self.cluster.num_gpus_per_node
            )
            for seat in seats
        ]
        for seat, configured in zip(seats, configure_workers(plan, calls)):
            bundle = self._bundles[seat.bundle]
            options = {**share, "name": self._metadata[seat.rank]["name"]}
            handles.append(
                self._builder.submit(
                    plan, bundle.placement_group, bundle.bundle_idx, options, configured, self._env_vars_of(seat)
                )
            )

    # --- ending ------------------------------------------------------------------------------------------------------

    def shutdown(self, cleanup_method: str | None = None, timeout: float = 30.0, force: bool = False) -> bool:
        """End all workers. May be called again.

        Args:
            cleanup_method: called on every worker first.
            timeout: seconds for clean-up and exit together; what still runs then is killed.
            force: kill at once, without clean-up.

        Returns:
            Whether every worker has ended, after a clean-up without errors where one was asked for, and (without
            `force`) by itself.
        """
        if self._is_shut_down:
            return True
        if cleanup_method is not None and not force:
            self._check_method(cleanup_method)
        self._stopped.set()
        workers, self._is_shut_down = self._workers, True
        deadline = time.monotonic() + timeout
        try:
            if force:
                return kill_and_wait(workers)
            clean = cleanup_method is None or self._clean_up(cleanup_method, timeout)
            for handle in workers:
                handle.__ray_terminate__.remote()
            if all_dead(workers, max(0.0, deadline - time.monotonic())):
                return clean
            logger.warning("%s did not end within %.0f s; killing its workers", self.label, timeout)
            kill_and_wait(workers)
            return False
        finally:
            self._workers = []
            self.cluster.move_out(self)

    def _clean_up(self, method: str, timeout: float) -> bool:
        references = [getattr(handle, method).remote() for handle in self._workers]
        done, late = ray.wait(references, num_returns=len(references), timeout=timeout)
        failed = 0
        for reference in done:
            try:
                ray.get(reference)
            except RayError as error:
                failed += 1
                logger.warning("%s: the clean-up method %r failed: %s", self.label, method, error)
        if late:
            logger.warning("%s: %d workers did not finish %r in %.0f s", self.label, len(late), method, timeout)
        return not failed and not late


def _check_sharding(sharding: NamedSharding, world_size: int) -> None:
    ranks = sorted(int(rank) for rank in sharding.layout.flat)
    if ranks != list(range(world_size)):
        raise ConfigError(
            f"sharding_annotations lay out the ranks {ranks}, but the group has {world_size} workers: ranks 0 to "
            f"{world_size - 1}"
        )
