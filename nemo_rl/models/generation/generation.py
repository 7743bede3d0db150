"""The driver's side of generation: prompts spread over the workers, completions put together in their order.

::

    prompts ──contiguous parts──► one worker each ──► results joined in the order of the prompts
    WeightUpdate ──to all────────► digests of the workers' own memory, compared with the sender's

This module imports no worker: the backend's class is named by `registry` and imported in its own venv.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup
from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.models.cpu_threads import cpu_env_vars
from nemo_rl.models.generation.interfaces import GenerationInterface, GenerationResult
from nemo_rl.models.generation.prompts import check_prompt_lengths
from nemo_rl.models.generation.registry import generation_backend
from nemo_rl.models.policy.config import EMBEDDED_MODEL, PolicyConfig
from nemo_rl.models.weights.digest import check_digest
from nemo_rl.models.weights.interfaces import WeightUpdate

if TYPE_CHECKING:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.generation.config import SamplingConfig


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
        workers_per_node = _workers_per_node(cluster.bundle_counts, config.generation.num_workers)
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
            num_local_workers=max(workers_per_node),
            py_executable=backend.py_executable_override(config.generation.py_executable, use_gpus=cluster.use_gpus),
        )
        cluster.bundles()  # reserved before the threads of several groups ask for them
        threads = ThreadPoolExecutor(1, thread_name_prefix="start generation")
        self._starting: Future[RayWorkerGroup] = threads.submit(
            RayWorkerGroup,
            cluster,
            builder,
            workers_per_node=workers_per_node,
            name_prefix="generation",
            env_vars={} if cluster.use_gpus else cpu_env_vars(),
        )
        threads.shutdown(wait=False)

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
        lengths = prompts["input_lengths"]
        check_prompt_lengths(lengths.tolist(), self._max_sequence_length)
        workers = self._workers
        bounds = _even_parts(len(lengths), workers.world_size)
        parts = [{key: prompts[key][start:end] for key in ("input_ids", "input_lengths")} for start, end in bounds]
        references = workers.run_all_workers_multiple_data(
            "generate",
            prompts=parts,
            first_prompt=[start for start, _ in bounds],
            common_kwargs={
                "seed": seed,
                "num_generations": num_generations,
                "greedy": greedy,
                "sampling": sampling,
            },
        )
        return join(workers.get_all_worker_results(references))

    def update_weights(self, update: WeightUpdate) -> str:
        workers = self._workers
        references = workers.run_all_workers_single_data("update_weights", update=update)
        for rank, digest in enumerate(workers.get_all_worker_results(references)):
            where = workers.describe_worker(rank)
            check_digest(version=update.version, expected=update.digest, found=digest, where=where)
        return update.digest

    def attestation(self) -> list[dict[str, Any]]:
        workers = self._workers
        own = workers.get_all_worker_results(workers.run_all_workers_single_data("attestation"))
        return [launched | reported for launched, reported in zip(workers.attestation, own, strict=True)]

    def shutdown(self) -> None:
        if self._starting.exception() is None:  # waits for a start that is still under way
            self._workers.shutdown(cleanup_method="shutdown")


def join(results: Sequence[GenerationResult]) -> GenerationResult:
    """Results of consecutive prompts as one, padded to the longest completion."""
    first = results[0]
    if len(results) == 1:
        return first
    width = max(result.output_ids.shape[1] for result in results)

    def rows(name: str) -> torch.Tensor:
        tensors = [getattr(result, name) for result in results]
        return torch.cat([torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    def column(name: str) -> torch.Tensor:
        return torch.cat([getattr(result, name) for result in results])

    return GenerationResult(
        output_ids=rows("output_ids"),
        output_lengths=column("output_lengths"),
        prompt_lengths=column("prompt_lengths"),
        logprobs=rows("logprobs"),
        sampling_logprobs=rows("sampling_logprobs"),
        truncated=column("truncated"),
        texts=[text for result in results for text in result.texts],
        weights_version=first.weights_version,
    )


def _workers_per_node(bundle_counts: Sequence[int], num_workers: int | None) -> list[int]:
    """How many workers each node gets: one per bundle, or `num_workers` spread as evenly as the bundles allow."""
    if num_workers is None:
        return list(bundle_counts)
    if num_workers > sum(bundle_counts):
        raise ConfigError(
            f"policy.generation.num_workers={num_workers}, but the cluster has only {sum(bundle_counts)} places "
            f"({list(bundle_counts)} per node); lower it, or raise cluster.cpu_workers_per_node or cluster.num_nodes"
        )
    counts = [0] * len(bundle_counts)
    for _ in range(num_workers):
        free = [node for node, limit in enumerate(bundle_counts) if counts[node] < limit]
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
