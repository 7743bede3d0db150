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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from nemo_rl.distributed.futures import MultiWorkerFuture, Reference, get_values
from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.worker_builder import MAX_DESCRIPTIONS, RayWorkerBuilder, configure_call, keeps_changing
from nemo_rl.distributed.worker_dispatch import (
    check_list_lengths,
    check_nested_lengths,
    pick,
    plan_sharded_call,
    ranks_called,
)
from nemo_rl.distributed.worker_launch import IsolatedWorkerInitializer, LaunchPlan, configure_workers
from nemo_rl.distributed.worker_layout import WorkerMetadata, plan_seats
from nemo_rl.distributed.worker_start import StaleDescription, StartingWorker, all_dead, await_started, kill_and_wait
from nemo_rl.errors import ConfigError, WorkerError

__all__ = ["IsolatedWorkerInitializer", "MultiWorkerFuture", "RayWorkerBuilder", "RayWorkerGroup", "WorkerMetadata"]

logger = logging.getLogger(__name__)

_DATA_PARALLEL = "data_parallel"
# Values of these types are sent as they are: they are smaller than a reference to a shared copy.
_SMALL_TYPES = (type(None), bool, int, float)
_SMALL_TEXT = 256


class RayWorkerGroup:
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

    Raises:
        ConfigError: arguments that do not fit the cluster, or each other.
        ResourceInsufficientError, NodeVenvError, RuntimeEnvError, UnregisteredActorError: see the parts.
        WorkerStartError: a worker died or did not answer; with its own traceback.
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
    ) -> None:
        self.cluster = cluster
        self.sharding_annotations = sharding_annotations
        self._builder = remote_worker_builder
        self._seats = plan_seats(cluster.bundle_counts, workers_per_node, bundle_indices_list)
        if sharding_annotations is not None:
            _check_sharding(sharding_annotations, len(self._seats))
        self.label = name_prefix or remote_worker_builder.ray_actor_class_fqn.rpartition(".")[2]
        self._workers: list[ActorHandle] = []
        self._attestation: list[dict[str, Any]] = []
        self._is_shut_down = False
        started = time.monotonic()
        plan = remote_worker_builder.plan(env_vars=env_vars)
        self._metadata, rank_env_vars = self._take_seats()
        plan.serve_nodes(self._bundles[seat.bundle].node_id for seat in self._seats)
        self._methods = self._start(plan, rank_env_vars)
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
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self._attestation, indent=1), encoding="utf-8")
        os.replace(temporary, target)
        return target

    # --- starting ----------------------------------------------------------------------------------------------------

    def _take_seats(self) -> tuple[list[WorkerMetadata], list[dict[str, str]]]:
        """Reserve bundles and ports. Returns each worker's metadata and the variables that only it gets."""
        self._bundles = self.cluster.bundles()
        group_index = {id(group): index for index, group in enumerate(self.cluster.get_placement_groups())}
        taken = [self._bundles[seat.bundle] for seat in self._seats]
        places = [(group_index[id(bundle.placement_group)], bundle.bundle_idx) for bundle in taken]
        (self.master_address, self.master_port), *ports = self.cluster.get_available_addresses_and_ports_batch(
            [places[0], *places]
        )
        token = secrets.token_hex(3)
        metadata: list[WorkerMetadata] = []
        env_vars: list[dict[str, str]] = []
        for seat, bundle in zip(self._seats, taken):
            shard = seat.tied_group
            if self._has_data_axis:
                assert self.sharding_annotations is not None
                shard = self.sharding_annotations.get_worker_coords(seat.rank)[_DATA_PARALLEL]
            metadata.append(
                {
                    "node_idx": seat.node_idx,
                    "local_rank": seat.local_rank,
                    "global_rank": seat.rank,
                    "name": f"{self.label}-{seat.node_idx}-{bundle.local_idx}-{token}",
                    "bundle_indices": seat.bundle_indices,
                    "dp_shard_idx": shard,
                }
            )
            env_vars.append(
                {
                    "RANK": str(seat.rank),
                    "LOCAL_RANK": str(seat.local_rank),
                    "WORLD_SIZE": str(len(self._seats)),
                    "NODE_RANK": str(seat.node_idx),
                    "MASTER_ADDR": self.master_address,
                    "MASTER_PORT": str(self.master_port),
                    # One entry per rank, as JSON (which is also a Python literal).
                    "AVAILABLE_ADDR_LIST": json.dumps([address for address, _ in ports]),
                    "AVAILABLE_PORT_LIST": json.dumps([port for _, port in ports]),
                }
            )
        return metadata, env_vars

    def _start(self, plan: LaunchPlan, rank_env_vars: list[dict[str, str]]) -> tuple[str, ...]:
        """Create all actors and wait for them; again if the class is not what was described. Returns its methods."""
        for _ in range(MAX_DESCRIPTIONS):
            try:
                self._create(plan, rank_env_vars)
                starting = [
                    StartingWorker(handle, plan.fqn, self.describe_worker(rank), plan.secrets)
                    for rank, handle in enumerate(self._workers)
                ]
                answers = await_started(starting)
            except StaleDescription as stale:
                logger.info("%s has changed since it was described; starting it again", plan.fqn)
                plan = plan.redescribed(stale.description)
                continue
            except BaseException:
                kill_and_wait(self._workers)
                self._workers = []
                raise
            self._attestation = [
                {"rank": rank, "name": self._metadata[rank]["name"], **answer} for rank, answer in enumerate(answers)
            ]
            return plan.description.methods
        raise WorkerError(keeps_changing(plan.fqn))

    def _create(self, plan: LaunchPlan, rank_env_vars: list[dict[str, str]]) -> None:
        share = self.cluster.worker_share
        calls = [
            configure_call(
                share["num_gpus"], seat.bundle_indices if seat.is_leader else None, self.cluster.num_gpus_per_node
            )
            for seat in self._seats
        ]
        self._workers = []
        for seat, configured in zip(self._seats, configure_workers(plan, calls)):
            bundle = self._bundles[seat.bundle]
            options = {**share, "name": self._metadata[seat.rank]["name"]}
            self._workers.append(
                self._builder.submit(
                    plan, bundle.placement_group, bundle.bundle_idx, options, configured, rank_env_vars[seat.rank]
                )
            )

    # --- calling -----------------------------------------------------------------------------------------------------

    def run_single_worker_single_data(self, method: str, worker_idx: int, **kwargs: Any) -> Reference:
        """Call `method(**kwargs)` on one worker."""
        self._check_method(method)
        if not 0 <= worker_idx < len(self._workers):
            raise IndexError(f"worker {worker_idx} does not exist: {self.label} has {len(self._workers)}")
        return getattr(self._workers[worker_idx], method).remote(**kwargs)

    def run_all_workers_single_data(
        self, method: str, *, run_rank_0_only_axes: list[str] | None = None, **kwargs: Any
    ) -> list[Reference]:
        """Call `method(**kwargs)` on all workers, with the same data: each argument is put into the object store once.

        Args:
            run_rank_0_only_axes: axes of which only index 0 is called.

        Returns:
            One reference per called worker, in rank order.
        """
        self._check_method(method)
        ranks = ranks_called(self.sharding_annotations, self.world_size, run_rank_0_only_axes)
        shared = _shared(kwargs, len(ranks))
        return [getattr(self._workers[rank], method).remote(**shared) for rank in ranks]

    def run_all_workers_multiple_data(
        self,
        method: str,
        *,
        run_rank_0_only_axes: list[str] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
        **lists: Sequence[Any],
    ) -> list[Reference]:
        """Call `method` on all workers, each with its own entry of every list.

        Args:
            run_rank_0_only_axes: axes of which only index 0 is called.
            common_kwargs: the same for all.
            **lists: one entry per called worker, in rank order.

        Raises:
            ValueError: a list whose length is not the number of called workers, or an argument given twice.
        """
        self._check_method(method)
        ranks = ranks_called(self.sharding_annotations, self.world_size, run_rank_0_only_axes)
        check_list_lengths(lists, ranks)
        common = _shared(_common(common_kwargs, lists), len(ranks))
        return [
            getattr(self._workers[rank], method).remote(**common, **{name: data[i] for name, data in lists.items()})
            for i, rank in enumerate(ranks)
        ]

    def run_all_workers_sharded_data(
        self,
        method: str,
        *,
        in_sharded_axes: list[str] | None = None,
        replicate_on_axes: list[str] | None = None,
        output_is_replicated: list[str] | None = None,
        make_dummy_calls_to_free_axes: bool = False,
        common_kwargs: Mapping[str, Any] | None = None,
        **nested_lists: Any,
    ) -> MultiWorkerFuture:
        """Call `method` with data that is laid out on the group's named axes.

        Args:
            in_sharded_axes: axes along which the data differs; every argument is nested lists in this order.
            replicate_on_axes: axes along which workers get the same object, put into the object store once.
            output_is_replicated: axes along which the results are equal: only index 0's are kept.
            make_dummy_calls_to_free_axes: also call the workers that are not at index 0 of the other (free) axes, with
                None for every nested argument; their results are dropped.
            common_kwargs: the same for all, dummy calls included.
            **nested_lists: whole objects when `in_sharded_axes` is empty.

        Raises:
            ValueError: an unknown axis, one both sharded and replicated, or data of another length than its axis.
        """
        self._check_method(method)
        sharding = self.sharding_annotations
        if sharding is None:
            raise ValueError(f"{self.label} has no sharding_annotations; run_all_workers_sharded_data needs them")
        call = plan_sharded_call(
            sharding, in_sharded_axes, replicate_on_axes, output_is_replicated, make_dummy_calls_to_free_axes
        )
        for name, data in nested_lists.items():
            check_nested_lengths(name, data, in_sharded_axes or [], sharding)
        ranks = sorted([*call.called, *call.dummies])
        common = _shared(_common(common_kwargs, nested_lists), len(ranks))
        users_per_slice = len(call.called) // len(set(call.slice_of.values()))
        slices = {
            index: _shared({name: pick(data, index) for name, data in nested_lists.items()}, users_per_slice)
            for index in set(call.slice_of.values())
        }
        nothing = dict.fromkeys(nested_lists)
        futures = [
            getattr(self._workers[rank], method).remote(
                **common, **(slices[call.slice_of[rank]] if rank in call.slice_of else nothing)
            )
            for rank in ranks
        ]
        return MultiWorkerFuture(futures, ranks, call.returning)

    def get_all_worker_results(
        self, future: MultiWorkerFuture | Sequence[Reference], return_generators_as_proxies: bool = False
    ) -> list[Any]:
        """Wait for a call's results: one per tied group, in rank order. For plain references: one each, in their order.

        A streaming method's result is the list of what it yields, or the generator itself with
        `return_generators_as_proxies`.

        Raises:
            WorkerError: a worker died; names its rank and node, and chains Ray's own error.
            Exception: whatever the worker's method raised.
        """
        if isinstance(future, MultiWorkerFuture):
            return future.get_results(self, return_generators_as_proxies)
        return get_values(self, future, range(self.world_size), return_generators_as_proxies)

    def _check_method(self, method: str) -> None:
        if self._is_shut_down:
            raise WorkerError(f"{self.label} was shut down; it cannot run {method!r}")
        if method not in self._methods:
            raise AttributeError(
                f"{self._builder.ray_actor_class_fqn} has no method {method!r}. Its methods: {', '.join(self._methods)}"
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


def _common(common_kwargs: Mapping[str, Any] | None, data: Mapping[str, Any]) -> dict[str, Any]:
    common = dict(common_kwargs or {})
    twice = sorted(common.keys() & data.keys())
    if twice:
        raise ValueError(f"{twice} are given both in common_kwargs and as data")
    return common


def _shared(kwargs: Mapping[str, Any], num_users: int) -> dict[str, Any]:
    """`kwargs` with every value that several workers will read put into the object store, once."""
    if num_users < 2:
        return dict(kwargs)
    return {name: value if _travels_as_is(value) else ray.put(value) for name, value in kwargs.items()}


def _travels_as_is(value: object) -> bool:
    if isinstance(value, str | bytes):
        return len(value) <= _SMALL_TEXT
    return isinstance(value, (*_SMALL_TYPES, ray.ObjectRef))
