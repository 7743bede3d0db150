"""The driver's side of generation: prompts spread over the workers, completions put together in their order.

::

    prompts ──contiguous parts──► one replica each ──► results joined in the order of the prompts,
                                                       or handed over piece by piece as they come (`stream`)
    WeightUpdate ──to all────────► digests of the workers' own memory, compared with the sender's

A replica is one worker, or a tied group of workers that hold one copy of the model together and all get its prompts.
When a worker dies, all are started anew with the last weights, and what is missing is generated again. It is the same
as without the death, because a draw depends on seed and position only.
This module imports no worker: the backend's class is named by `registry` and imported in its own venv.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayActorError

from nemo_rl.distributed.futures import MultiWorkerFuture, worker_error
from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup
from nemo_rl.errors import AttestationError, ConfigError, ModelError, WorkerError, WorkerStartError
from nemo_rl.models.cpu_threads import cpu_env_vars
from nemo_rl.models.generation.interfaces import GenerationInterface, GenerationResult
from nemo_rl.models.generation.prompts import check_prompt_lengths
from nemo_rl.models.generation.registry import generation_backend
from nemo_rl.models.generation.results import join, select
from nemo_rl.models.policy.config import EMBEDDED_MODEL, PolicyConfig
from nemo_rl.models.weights.digest import check_digest
from nemo_rl.models.weights.interfaces import WeightUpdate

if TYPE_CHECKING:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.generation.config import SamplingConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")
_REPLICA, _PART = "data_parallel", "part_of_replica"


class Generation(GenerationInterface):
    """Generation workers on the bundles of a cluster.

    The constructor returns at once, while the workers start; `wait_ready`, or the first call, waits for them.

    Args:
        cluster: where the workers run.
        config: of the policy; its section `generation` says how to sample.
        model_name: Hugging Face directory or hub name; None takes `config.model_name`. The embedded model must have
            been made: pass its directory.

    Raises:
        ConfigError: an unknown backend, or more workers than the cluster has bundles.
        ModelError: `embedded` is still to be resolved.
    """

    def __init__(self, cluster: RayVirtualCluster, config: PolicyConfig, model_name: str | None = None) -> None:
        model_name = model_name or config.model_name
        if model_name == EMBEDDED_MODEL:
            raise ModelError("the embedded model must be made first: pass model_name=ensure_embedded_model(...)")
        size = config.generation.options.workers_per_replica
        replicas = _replicas(cluster.bundle_counts, config.generation.num_workers, size)
        self._max_sequence_length = config.max_sequence_length
        backend = generation_backend(config.generation.backend)
        builder = RayWorkerBuilder(
            backend.fqn,
            model_name,
            config.generation,
            max_sequence_length=config.max_sequence_length,
            tokenizer_name=config.tokenizer_name,
            precision=config.precision,
            use_gpu=cluster.use_gpus,
            num_local_workers=max(
                sum(len(bundles) for node, bundles in replicas if node == index)
                for index in range(len(cluster.bundle_counts))
            ),
            py_executable=backend.py_executable_override(config.generation.py_executable, use_gpus=cluster.use_gpus),
        )
        cluster.bundles()  # reserved before the threads of several groups ask for them
        self._start_group = functools.partial(
            RayWorkerGroup,
            cluster,
            builder,
            name_prefix="generation",
            bundle_indices_list=replicas,
            sharding_annotations=NamedSharding(np.arange(len(replicas) * size).reshape(-1, size), [_REPLICA, _PART]),
            env_vars={} if cluster.use_gpus else cpu_env_vars(),
        )
        self._update: WeightUpdate | None = None
        self._restarts_left = config.generation.max_restarts
        self._starting = self._start()

    def _start(self) -> Future[RayWorkerGroup]:
        threads = ThreadPoolExecutor(1, thread_name_prefix="start generation")
        starting = threads.submit(self._start_group)
        threads.shutdown(wait=False)
        return starting

    def wait_ready(self) -> None:
        """Wait until every worker is up. Raises whatever made the start fail."""
        self._starting.result()

    @property
    def _workers(self) -> RayWorkerGroup:
        return self._starting.result()

    def generate(
        self,
        prompts: BatchedDataDict,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
    ) -> GenerationResult:
        how = {"seed": seed, "num_generations": num_generations, "greedy": greedy, "sampling": sampling}
        return self._repeated(
            lambda: join(self._workers.get_all_worker_results(self._call("generate", prompts, **how)))
        )

    def stream(
        self,
        prompts: BatchedDataDict,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        """See `GenerationInterface.stream`. Workers finish what they began also when the caller stops iterating."""
        how = {"seed": seed, "num_generations": num_generations, "greedy": greedy, "sampling": sampling}
        called = self._repeated(lambda: self._call("stream", prompts, **how))
        return self._pieces(called, prompts, how)

    def _pieces(
        self, called: MultiWorkerFuture, prompts: BatchedDataDict, how: dict[str, Any]
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        seen: set[int] = set()
        while True:
            try:
                for positions, piece in _pieces(self._workers, called):
                    new = [index for index, position in enumerate(positions) if position not in seen]
                    seen.update(positions)
                    if len(new) == len(positions):
                        yield positions, piece
                    elif new:
                        rows = [
                            index * how["num_generations"] + g for index in new for g in range(how["num_generations"])
                        ]
                        yield [positions[index] for index in new], select(piece, rows)
                return
            except WorkerError as error:
                self._restart(error)
            called = self._repeated(lambda: self._call("stream", prompts, **how))

    def _repeated(self, call: Callable[[], T]) -> T:
        """Make a call; once more when a worker dies."""
        while True:
            try:
                return call()
            except WorkerError as error:
                self._restart(error)

    def _restart(self, error: WorkerError) -> None:
        """Start all workers anew with the last weights; raises `error` when that has been done often enough."""
        if isinstance(error, WorkerStartError | AttestationError) or not self._restarts_left:
            raise error
        self._restarts_left -= 1
        logger.warning("%s. Generation starts anew; it may do so %d more times.", error, self._restarts_left)
        self._workers.shutdown(force=True)
        self._starting = self._start()
        if self._update is not None:
            self._load(self._update, "update_weights")

    def _call(self, method: str, prompts: BatchedDataDict, **how: Any) -> MultiWorkerFuture:
        """Give each replica its part of the prompts."""
        lengths = prompts["input_lengths"]
        check_prompt_lengths(lengths.tolist(), self._max_sequence_length)
        workers = self._workers
        bounds = _even_parts(len(lengths), workers.dp_size)
        parts = [{key: prompts[key][start:end] for key in ("input_ids", "input_lengths")} for start, end in bounds]
        return workers.run_all_workers_sharded_data(
            method,
            in_sharded_axes=[_REPLICA],
            replicate_on_axes=[_PART],
            output_is_replicated=[_PART],
            common_kwargs=how,
            prompts=parts,
            first_prompt=[start for start, _ in bounds],
        )

    def update_weights(self, update: WeightUpdate, *, in_flight: bool = False) -> str:
        def load() -> str:
            workers = self._workers
            # Workers that hold a model together have to take the same steps, so with them it comes between two calls.
            alone = workers.dp_size == workers.world_size
            return self._load(update, "update_weights_in_flight" if in_flight and alone else "update_weights")

        digest = self._repeated(load)
        self._update = update
        return digest

    def _load(self, update: WeightUpdate, method: str) -> str:
        workers = self._workers
        for rank, digest in enumerate(self._on_all(method, update=update)):
            where = workers.describe_worker(rank)
            check_digest(version=update.version, expected=update.digest, found=digest, where=where)
        return update.digest

    def sleep(self, level: int = 1) -> None:
        """Let the workers give their GPUs' memory back until `wake`; level 1 keeps the weights in host memory.

        After level 2 the weights have to be published anew. On CPUs, and for backends that hold none, nothing happens.
        """
        self._on_all("sleep", level=level)

    def wake(self, tags: list[str] | None = None) -> None:
        """Take the memory again: "weights", "kv_cache", or None for both."""
        self._on_all("wake", tags=tags)

    def _on_all(self, method: str, **kwargs: Any) -> list[Any]:
        workers = self._workers
        return workers.get_all_worker_results(workers.run_all_workers_single_data(method, **kwargs))

    def attestation(self) -> list[dict[str, Any]]:
        workers = self._workers
        own = self._on_all("attestation")
        return [launched | reported for launched, reported in zip(workers.attestation, own, strict=True)]

    def shutdown(self) -> None:
        if self._starting.exception() is None:  # waits for a start that is still under way
            self._workers.shutdown(cleanup_method="shutdown")


def _pieces(workers: RayWorkerGroup, called: MultiWorkerFuture) -> Iterator[tuple[list[int], GenerationResult]]:
    """What the called workers yield, as it comes. Raises as `RayWorkerGroup.get_all_worker_results` does."""
    running = list(called.futures)
    kept = called.return_from_workers or called.called_workers
    ranks = dict(zip(map(id, running), called.called_workers, strict=True))
    try:
        while running:
            [stream], _ = ray.wait(running, num_returns=1, fetch_local=False)
            assert isinstance(stream, ray.ObjectRefGenerator)
            reference = next(stream, None)
            if reference is None:
                running = [other for other in running if other is not stream]
                continue
            piece = ray.get(reference)
            if ranks[id(stream)] in kept:
                yield piece
    except RayActorError as error:
        raise worker_error(workers, error, [], called.called_workers) from error


def _replicas(bundle_counts: Sequence[int], num_workers: int | None, size: int) -> list[tuple[int, list[int]]]:
    """Node and local bundles of every replica, for `RayWorkerGroup`; a replica of `size` workers stays on its node.

    Raises:
        ConfigError: the workers do not make whole replicas, or there are more than the bundles allow.
    """
    counts = _replicas_per_node(bundle_counts, num_workers, size)
    return [
        (node, list(range(index * size, (index + 1) * size)))
        for node, count in enumerate(counts)
        for index in range(count)
    ]


def _replicas_per_node(bundle_counts: Sequence[int], num_workers: int | None, size: int) -> list[int]:
    """How many replicas each node gets: all it has room for, or those of `num_workers` spread as evenly as it goes."""
    limits = [count // size for count in bundle_counts]
    uneven = num_workers % size if num_workers is not None else any(count % size for count in bundle_counts)
    if uneven:
        what = f"policy.generation.num_workers={num_workers}" if num_workers else f"places per node, {bundle_counts},"
        raise ConfigError(f"{what} cannot be divided into replicas of {size} workers (policy.generation.options)")
    if num_workers is None:
        return limits
    if num_workers > sum(limits) * size:
        raise ConfigError(
            f"policy.generation.num_workers={num_workers}, but the cluster has only {sum(limits) * size} places "
            f"({[limit * size for limit in limits]} per node); lower it, or raise cluster.cpu_workers_per_node or "
            "cluster.num_nodes"
        )
    counts = [0] * len(bundle_counts)
    for _ in range(num_workers // size):
        free = [node for node, limit in enumerate(limits) if counts[node] < limit]
        counts[min(free, key=lambda node: counts[node])] += 1
    return counts


def _even_parts(total: int, num_parts: int) -> list[tuple[int, int]]:
    """Consecutive (start, end) of almost equal sizes; empty ones at the end where there are more parts than items."""
    small, extra = divmod(total, num_parts)
    bounds, start = [], 0
    for part in range(num_parts):
        end = start + small + (part < extra)
        bounds.append((start, end))
        start = end
    return bounds
