"""The policy on the driver: its workers train on shards of a batch, and send their weights to generation.

This module imports no worker: `models.backends` names the worker class, which is imported in its own venv.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.worker_groups import RayWorkerBuilder
from nemo_rl.errors import ModelError
from nemo_rl.models.backends import generation_backend, policy_backend
from nemo_rl.models.cpu_threads import cpu_env_vars
from nemo_rl.models.policy.config import EMBEDDED_MODELS, PolicyConfig
from nemo_rl.models.policy.interfaces import LossFunction, PolicyInterface, TrainResult, rows_per_group
from nemo_rl.models.policy.model_group import ModelGroup, join_rows
from nemo_rl.models.policy.weight_offer import PolicyWeights, WeightSenders
from nemo_rl.models.routed_experts import ROUTED_EXPERTS
from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate
from nemo_rl.models.weights.routes import Route
from nemo_rl.models.weights.transports import make_transport

logger = logging.getLogger(__name__)


class Policy(ModelGroup, PolicyInterface):
    """Runs a policy with one worker on each bundle of a cluster.

    The constructor returns immediately and the workers start in the background. `wait_ready`, or the first call, waits
    for them.

    Example:
        Train one step on CPUs::

            with RayVirtualCluster([2], use_gpus=False) as cluster:
                policy = Policy(cluster, PolicyConfig(), "path/to/model", total_steps=100, seed=0)
                print(policy.train(batch, loss_fn).metrics["loss"])
                policy.shutdown()

    Args:
        cluster: the cluster that the workers run on.
        config: the policy section.
        model_name: Hugging Face directory or hub name; None takes `config.model_name`. For an embedded model, pass the
            directory that `ensure_embedded_model` returns.
        total_steps: optimizer steps of the whole run, for schedules without a `total_steps` of their own.
        seed: seed of the run.
        route: transports of weights to generation; None: published through Ray.

    Raises:
        ConfigError: the backend is unknown.
        ModelError: the model name is still that of an embedded model.
    """

    def __init__(
        self,
        cluster: RayVirtualCluster,
        config: PolicyConfig,
        model_name: str | None = None,
        *,
        total_steps: int,
        seed: int,
        route: Route | None = None,
    ) -> None:
        if model_name is not None:
            tokenizer_name = config.tokenizer_name or model_name
            config = config.model_copy(update={"model_name": model_name, "tokenizer_name": tokenizer_name})
        if config.model_name in EMBEDDED_MODELS:
            raise ModelError("an embedded model has not been resolved: pass model_name=ensure_embedded_model(...)")
        self._config = config
        backend = policy_backend(config.backend)
        generation = generation_backend(config.generation.backend)
        route = route or Route()
        self._streamed = route.streamed if backend.streams_weights and generation.streams_weights else None
        self._spans_nodes = route.spans_nodes
        self._sends_adapters = _sends_adapters(config, route)
        stream_options: dict[str, Any] = {}
        if self._streamed is not None:
            stream_options["weight_stream_transport"] = self._streamed
        builder = RayWorkerBuilder(
            backend.fqn,
            config,
            total_steps=total_steps,
            seed=seed,
            num_local_workers=max(cluster.bundle_counts),
            device_type="cuda" if cluster.use_gpus else "cpu",
            weight_transport=route.published,
            **stream_options,
            py_executable=backend.py_executable_override(config.py_executable, use_gpus=cluster.use_gpus),
        )
        self._offer: PolicyWeights | None = None
        super().__init__(
            cluster,
            builder,
            config.options.layout(cluster.world_size()),
            config.batching,
            name="policy",
            env_vars=backend.gpu_env_vars if cluster.use_gpus else cpu_env_vars(),
        )

    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        return self._outputs("get_logprobs", batch)

    def get_reference_policy_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        return self._outputs("get_reference_policy_logprobs", batch)

    def get_scores(self, batch: BatchedDataDict) -> torch.Tensor:
        return self._outputs("get_scores", batch)

    def _outputs(self, method: str, batch: BatchedDataDict) -> torch.Tensor:
        """Return what a method of the workers computes for each row, in the order of the batch."""
        keys = [key for key in ("input_ids", "input_lengths", "logprob_mask", ROUTED_EXPERTS) if key in batch]
        inputs = BatchedDataDict({key: batch[key] for key in keys})
        shards, order = self._shard(inputs, batch_size=None)
        return join_rows(self._on_shards(method, shards), order)

    def train(self, batch: BatchedDataDict, loss_fn: LossFunction, *, batch_size: int | None = None) -> TrainResult:
        self._end_offer()
        batch_size = batch_size or self._config.train_global_batch_size or batch.size
        shards, _ = self._shard(batch, batch_size, rows_per_group(loss_fn))
        local_batch_size = batch_size // self._dp_size
        results = self._on_shards("train", shards, loss_fn=loss_fn, local_batch_size=local_batch_size)
        result: TrainResult = results[0]
        return result

    def publish_weights(self, version: int, dtype: str) -> WeightUpdate:
        return self._published("publish_weights", version, dtype)

    def _published(self, method: str, version: int, dtype: str) -> WeightUpdate:
        results = self._on_all(method, version=version, dtype=dtype)
        update: WeightUpdate = next(result for result in results if result is not None)
        return update

    def offer_weights(self, version: int, dtype: str, *, lasting: bool = False) -> WeightUpdate | WeightOffer:
        if self._sends_adapters:
            return self._published("publish_adapters", version, dtype)
        if lasting or self._streamed is None:
            return self.publish_weights(version, dtype)
        self._end_offer()
        self._offer = PolicyWeights(lambda: self._weight_senders, version, dtype)
        return self._offer

    @functools.cached_property
    def _weight_senders(self) -> WeightSenders:
        assert self._streamed is not None
        return WeightSenders(self._workers, self._streamed, spans_nodes=self._spans_nodes)

    def _end_offer(self) -> None:
        if self._offer is not None:
            self._offer.expire()

    def offload(self, *, keep_weights: bool = False) -> None:
        self._on_all("offload", keep_weights=keep_weights)

    def save_checkpoint(self, directory: Path) -> None:
        self._on_all("save_checkpoint", directory=str(directory.absolute()))

    def load_checkpoint(self, directory: Path) -> None:
        self._end_offer()
        self._on_all("load_checkpoint", directory=str(directory.absolute()))


def _sends_adapters(config: PolicyConfig, route: Route) -> bool:
    """Whether generation gets the adapters of `policy.lora` instead of all weights."""
    if config.lora is None or config.lora.sync == "merged":
        return False
    if not generation_backend(config.generation.backend).loads_adapters:
        reason = f"policy.generation.backend={config.generation.backend} cannot load adapters"
    elif config.lora.sync is None and route.streamed is not None and make_transport(route.streamed).on_gpu:
        reason = f"they go from GPU to GPU ({route.streamed}); policy.lora.sync=adapter sends adapters, by host memory"
    else:
        return True
    logger.info("policy.lora: generation gets all weights, merged: %s", reason)
    return False
