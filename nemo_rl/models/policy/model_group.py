"""The workers of one model on the driver: starts them, divides batches among them and joins the results.

::

    batch ──shard──► one object per data-parallel rank ──► workers (collectives among themselves)
      ▲                                                      │
      └──────── results in the order of the batch ◄──────────┘
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict, SlicedDataDict
from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup
from nemo_rl.models.policy.config import DATA_PARALLEL, BatchingConfig
from nemo_rl.models.policy.microbatching import sharding_args


class ModelGroup:
    """Runs one worker on each bundle of a cluster.

    The constructor returns immediately and the workers start in the background. `wait_ready`, or the first call, waits
    for them.

    Args:
        cluster: the cluster that the workers run on.
        builder: builds a worker.
        layout: the ranks on named axes, one of which is `DATA_PARALLEL`.
        batching: how a worker's rows become micro-batches.
        name: prefix of the workers' names.
        env_vars: variables of the workers' processes.
    """

    def __init__(
        self,
        cluster: RayVirtualCluster,
        builder: RayWorkerBuilder,
        layout: NamedSharding,
        batching: BatchingConfig,
        *,
        name: str,
        env_vars: Mapping[str, str],
    ) -> None:
        self._dp_size = layout.get_axis_size(DATA_PARALLEL)
        self._replicated = [axis for axis in layout.names if axis != DATA_PARALLEL]
        self._batching = batching
        cluster.bundles()  # reserves them before the threads of several groups do
        self._stopped = threading.Event()
        threads = ThreadPoolExecutor(1, thread_name_prefix=f"start {name}")
        self._starting: Future[RayWorkerGroup] = threads.submit(
            RayWorkerGroup,
            cluster,
            builder,
            name_prefix=name,
            sharding_annotations=layout,
            env_vars=dict(env_vars),
            stopped=self._stopped,
        )
        threads.shutdown(wait=False)

    def wait_ready(self) -> None:
        """Wait until every worker holds the model. Raises the error that made the start fail."""
        self._starting.result()

    @property
    def _workers(self) -> RayWorkerGroup:
        return self._starting.result()

    @property
    def data_parallel_size(self) -> int:
        """Number of workers that a batch is divided among."""
        return self._dp_size

    def attestation(self) -> list[dict[str, Any]]:
        """Return one record per worker: where it runs, in which venv, with which software."""
        reports = self._on_all("attestation")
        return [launched | reported for launched, reported in zip(self._workers.attestation, reports)]

    def shutdown(self) -> None:
        """Stop all workers. Idempotent."""
        self._stopped.set()
        if self._starting.exception() is None:  # waits for a start that is still running; it ends soon
            self._workers.shutdown(cleanup_method="shutdown")

    def _shard(
        self, batch: BatchedDataDict, batch_size: int | None, rows_per_group: int = 1
    ) -> tuple[list[SlicedDataDict], list[int] | None]:
        """Return one shard per data-parallel rank, and the batch index of each of their rows (None: in order)."""
        result = batch.shard_by_batch_size(
            self._dp_size, batch_size, rows_per_group=rows_per_group, **sharding_args(self._batching)
        )
        return result if isinstance(result, tuple) else (result, None)

    def _on_shards(self, method: str, shards: list[SlicedDataDict], **common: Any) -> list[Any]:
        workers = self._workers
        future = workers.run_all_workers_sharded_data(
            method,
            in_sharded_axes=[DATA_PARALLEL],
            replicate_on_axes=self._replicated,
            output_is_replicated=self._replicated,
            common_kwargs=common,
            shard=shards,
        )
        return workers.get_all_worker_results(future)

    def _on_all(self, method: str, **kwargs: Any) -> list[Any]:
        workers = self._workers
        return workers.get_all_worker_results(workers.run_all_workers_single_data(method, **kwargs))


def join_rows(results: list[torch.Tensor], order: list[int] | None) -> torch.Tensor:
    """Join the results of shards, whose rows have these indices in the batch (None: they are in its order)."""
    rows = torch.cat(results)
    if order is None:
        return rows
    in_order = torch.empty_like(rows)
    in_order[torch.tensor(order)] = rows
    return in_order
