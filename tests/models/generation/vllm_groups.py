"""Helpers for tests with real vLLM: worker groups in the VLLM_CPU venv on a small local cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from tiny_generation import TinyModel

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generation import Generation
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.models.weights.sender import publish

# vLLM's attention on CPUs needs heads of at least 32.
WIDE = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1}
SAMPLING: dict[str, Any] = {"max_new_tokens": 12, "num_threads": 1, "stop_strings": ["7"]}
TEXTS = ("What is 1+1? ", "a", "37+48=", "What is 1+1? ", "ten chars!")


@contextlib.contextmanager
def local_cluster(num_workers: int) -> Iterator[RayVirtualCluster]:
    """Start a cluster whose workers run in their registered venvs, as in a real job."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", raising=False)
        start_local_ray(num_cpus=2)
        try:
            cluster = RayVirtualCluster([num_workers], use_gpus=False, max_colocated_worker_groups=2, name="vllm")
            yield cluster
            cluster.shutdown()
        finally:
            ray.shutdown()


@contextlib.contextmanager
def vllm_generation(
    cluster: RayVirtualCluster, model: TinyModel, *, options: dict[str, Any] | None = None, **sampling: Any
) -> Iterator[Generation]:
    """Start workers, without weights."""
    config = GenerationConfig(
        backend="vllm", options={"cpu_kv_cache_gib": 0.125, **(options or {})}, **{**SAMPLING, **sampling}
    )
    policy = PolicyConfig(model_name=str(model.directory), generation=config, max_sequence_length=64)
    generation = Generation(cluster, policy)
    try:
        generation.wait_ready()
        yield generation
    finally:
        generation.shutdown()


def published(model: TinyModel, version: int, scale: float = 1.0) -> WeightUpdate:
    """Publish the model's weights, each times `scale`, in Ray's object store."""
    tensors = ((name, parameter.detach() * scale) for name, parameter in model.model.named_parameters())
    return publish(tensors, version=version, dtype="float32", bucket_bytes=8192)


def batch(model: TinyModel, *texts: str) -> BatchedDataDict:
    ids, lengths = model.prompts(*(texts or TEXTS))
    return BatchedDataDict(input_ids=ids, input_lengths=lengths)


def torch_results(model: TinyModel, *, scale: float = 1.0, **sampling: Any) -> GenerationResult:
    """Return the torch backend's result for `TEXTS`, computed in this process."""
    generator = model.generator(loaded=False, **SAMPLING)
    tensors = ((name, parameter.detach() * scale) for name, parameter in model.model.named_parameters())
    generator.update_weights(publish(tensors, version=1, dtype="float32", transport="local"))
    return generator.generate(model.request(*TEXTS, **sampling))
