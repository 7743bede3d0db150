"""The driver's side of generation: prompts are distributed over the workers, and completions joined in order.

::

    prompts ──consecutive parts──► one replica each ──► results joined in the order of the prompts (`generate`),
                                                        or yielded as they arrive (`stream`)
    weights ───────to all────────► digests of the workers' memory, compared with the sender's

`replicas` describes replicas, and what happens when one of them dies.
This module imports no worker: `models.backends` names the worker class, which is imported in its own venv.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup
from nemo_rl.errors import ModelError
from nemo_rl.models.backends import generation_backend
from nemo_rl.models.cpu_threads import cpu_env_vars
from nemo_rl.models.generation.interfaces import GenerationInterface, GenerationRequest, GenerationResult
from nemo_rl.models.generation.replica_layout import replica_bundles
from nemo_rl.models.generation.replicas import Replicas
from nemo_rl.models.generation.results import join
from nemo_rl.models.policy.config import EMBEDDED_MODELS, PolicyConfig

if TYPE_CHECKING:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate


class Generation(GenerationInterface):
    """Runs generation workers on the bundles of a cluster.

    The constructor returns at once, while the workers start; `wait_ready`, or the first call, waits for them.

    Example:

        generation = Generation(cluster, config.policy)
        generation.update_weights(policy.publish_weights(version=1, dtype="float32"))
        result = generation.generate(prompts, seed=0, num_generations=8)
        generation.shutdown()

    Args:
        cluster: Where the workers run.
        config: The policy's configuration. Its section `generation` describes sampling.
        model_name: Hugging Face directory or hub name. None: `config.model_name`. For an embedded model, pass the
            directory that `ensure_embedded_model` returns.

    Raises:
        ConfigError: The backend is unknown, or there are more workers than the cluster has bundles.
        ModelError: The model name is still that of an embedded model.
    """

    def __init__(self, cluster: RayVirtualCluster, config: PolicyConfig, model_name: str | None = None) -> None:
        model_name = model_name or config.model_name
        if model_name in EMBEDDED_MODELS:
            raise ModelError("an embedded model must be built first: pass model_name=ensure_embedded_model(...)")
        size = config.generation.options.workers_per_replica
        bundles = replica_bundles(cluster.bundle_counts, config.generation.num_workers, size)
        self._max_sequence_length = config.max_sequence_length
        self._max_concurrent_calls = config.generation.options.max_concurrent_calls
        backend = generation_backend(config.generation.backend)
        builder = RayWorkerBuilder(
            backend.fqn,
            config.generator_spec(model_name, use_gpus=cluster.use_gpus),
            num_local_workers=max(
                sum(len(local_bundles) for node, local_bundles in bundles if node == index)
                for index in range(len(cluster.bundle_counts))
            ),
            py_executable=backend.py_executable_override(config.generation.py_executable, use_gpus=cluster.use_gpus),
        )
        cluster.bundles()  # reserve them before the threads of several groups ask for them

        self._stopped = threading.Event()

        def start() -> Replicas:
            workers = RayWorkerGroup(
                cluster,
                builder,
                name_prefix="generation",
                bundle_indices_list=bundles,
                env_vars={} if cluster.use_gpus else cpu_env_vars(),
                stopped=self._stopped,
            )
            return Replicas(
                workers,
                size=size,
                max_restarts=config.generation.max_restarts,
                runs_concurrently=self._max_concurrent_calls > 1,
            )

        threads = ThreadPoolExecutor(1, thread_name_prefix="start generation")
        self._starting: Future[Replicas] = threads.submit(start)
        threads.shutdown(wait=False)

    def wait_ready(self) -> None:
        """Wait until every worker is up. Raises the error that made the start fail."""
        self._starting.result()

    @property
    def _replicas(self) -> Replicas:
        return self._starting.result()

    def generate(
        self,
        prompts: BatchedDataDict,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
        rows: Sequence[int] | None = None,
    ) -> GenerationResult:
        request = GenerationRequest.for_prompts(
            prompts, seed=seed, num_generations=num_generations, greedy=greedy, sampling=sampling, rows=rows
        )
        pieces = self._run(request, streamed=False)
        return join([piece for _, piece in sorted(pieces, key=lambda item: item[0][:1])])

    def stream(
        self,
        prompts: BatchedDataDict,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        """See `GenerationInterface.stream`. Workers finish their calls even if the caller stops iterating."""
        request = GenerationRequest.for_prompts(
            prompts, seed=seed, num_generations=num_generations, greedy=greedy, sampling=sampling, rows=rows
        )
        return self._run(request, streamed=True)

    @property
    def max_concurrent_calls(self) -> int:
        return self._max_concurrent_calls

    def _run(self, request: GenerationRequest, *, streamed: bool) -> Iterator[tuple[list[int], GenerationResult]]:
        request.check_prompt_lengths(self._max_sequence_length)
        return self._replicas.run(request, streamed=streamed)

    def update_weights(self, update: WeightUpdate | WeightOffer, *, in_flight: bool = False) -> str:
        return self._replicas.update_weights(update, in_flight=in_flight)

    def sleep(self, level: int = 1) -> None:
        """Release the workers' GPU memory until `wake`. Level 1 keeps the weights in host memory.

        After level 2 the weights must be published again. On CPUs, and with backends that cannot sleep, this does
        nothing.
        """
        self._replicas.call_all("sleep", level=level)

    def wake(self, tags: list[str] | None = None) -> None:
        """Allocate the memory of the "weights" or the "kv_cache" again; None allocates both."""
        self._replicas.call_all("wake", on_replaced=False, tags=tags)  # a restarted worker is awake

    def attestation(self) -> list[dict[str, Any]]:
        return self._replicas.attestation()

    def shutdown(self) -> None:
        self._stopped.set()
        if self._starting.exception() is None:  # waits for a start that is still running; it ends soon
            self._replicas.workers.shutdown(cleanup_method="shutdown")
