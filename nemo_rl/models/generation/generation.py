"""The driver's side of generation: prompts spread over the workers, completions put together in their order.

::

    prompts ──consecutive parts──► one replica each ──► results joined in the order of the prompts,
                                                        or handed over piece by piece as they come (`stream`)
    weights ───────to all────────► digests of the workers' own memory, compared with the sender's

A replica is one worker, or a tied group of workers that hold one copy of the model together and all get its prompts.
`replicas` says what happens when one of them dies.
This module imports no worker: the backend's class is named by `models.backends` and imported in its own venv.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup
from nemo_rl.errors import ModelError
from nemo_rl.models.backends import generation_backend
from nemo_rl.models.cpu_threads import cpu_env_vars
from nemo_rl.models.generation.interfaces import GenerationInterface, GenerationResult
from nemo_rl.models.generation.prompts import check_prompt_lengths
from nemo_rl.models.generation.replica_layout import replica_bundles
from nemo_rl.models.generation.replicas import Replicas
from nemo_rl.models.generation.results import join
from nemo_rl.models.policy.config import EMBEDDED_MODEL, PolicyConfig

if TYPE_CHECKING:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate


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
        bundles = replica_bundles(cluster.bundle_counts, config.generation.num_workers, size)
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
                sum(len(own) for node, own in bundles if node == index) for index in range(len(cluster.bundle_counts))
            ),
            py_executable=backend.py_executable_override(config.generation.py_executable, use_gpus=cluster.use_gpus),
        )
        cluster.bundles()  # reserved before the threads of several groups ask for them

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
            return Replicas(workers, size=size, max_restarts=config.generation.max_restarts)

        threads = ThreadPoolExecutor(1, thread_name_prefix="start generation")
        self._starting: Future[Replicas] = threads.submit(start)
        threads.shutdown(wait=False)

    def wait_ready(self) -> None:
        """Wait until every worker is up. Raises whatever made the start fail."""
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
    ) -> GenerationResult:
        pieces = self._run("generate", prompts, seed, num_generations, greedy, sampling)
        return join([piece for _, piece in sorted(pieces, key=lambda item: item[0][:1])])

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
        return self._run("stream", prompts, seed, num_generations, greedy, sampling)

    def _run(
        self,
        method: str,
        prompts: BatchedDataDict,
        seed: int,
        num_generations: int,
        greedy: bool,
        sampling: SamplingConfig | None,
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        check_prompt_lengths(prompts["input_lengths"].tolist(), self._max_sequence_length)
        how = {"seed": seed, "num_generations": num_generations, "greedy": greedy, "sampling": sampling}
        return self._replicas.run(method, prompts, how)

    def update_weights(self, update: WeightUpdate | WeightOffer, *, in_flight: bool = False) -> str:
        return self._replicas.update_weights(update, in_flight=in_flight)

    def sleep(self, level: int = 1) -> None:
        """Let the workers give their GPUs' memory back until `wake`; level 1 keeps the weights in host memory.

        After level 2 the weights have to be published anew. On CPUs, and for backends that hold none, nothing happens.
        """
        self._replicas.call_all("sleep", level=level)

    def wake(self, tags: list[str] | None = None) -> None:
        """Take the memory again: "weights", "kv_cache", or None for both."""
        self._replicas.call_all("wake", on_new=False, tags=tags)  # a new worker is awake

    def attestation(self) -> list[dict[str, Any]]:
        return self._replicas.attestation()

    def shutdown(self) -> None:
        self._stopped.set()
        if self._starting.exception() is None:  # of a start that is still under way: it ends soon
            self._replicas.workers.shutdown(cleanup_method="shutdown")
