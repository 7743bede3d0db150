"""Tests several real vLLM workers: replicas of a model side by side, and one model over a tied group."""

from __future__ import annotations

import dataclasses
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_generation import assert_same, reference_logprobs
from vllm_groups import TEXTS, WIDE, batch, local_cluster, published, torch_results, vllm_generation

from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
from nemo_rl.errors import WeightSyncError, WorkerError, WorkerStartError
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.policy import Policy
from nemo_rl.models.policy.weight_offer import PolicyWeights
from nemo_rl.models.weights.routes import Route

pytestmark = pytest.mark.slow  # two processes import vLLM at a time


@pytest.fixture(scope="module")
def cluster():
    with local_cluster(2) as cluster:
        yield cluster


def test_too_small_kv_cache_names_the_cpu_option(cluster, tiny) -> None:
    options = {"cpu_kv_cache_gib": 1e-6}
    with (
        pytest.raises(WorkerStartError, match=r"set policy\.generation\.options\.cpu_kv_cache_gib"),
        vllm_generation(cluster, tiny("qwen2", **WIDE), options=options),
    ):
        pass


def test_results_survive_scaling_and_a_worker_death(cluster, tiny) -> None:
    model = tiny("qwen2", **WIDE)
    with vllm_generation(cluster, model) as generation:
        generation.update_weights(published(model, version=1))
        both = generation.generate(batch(model), seed=4, num_generations=3)
        alone = generation._replicas.workers.run_single_worker_single_data(
            "generate", worker_idx=1, request=model.request(*TEXTS, seed=4, num_generations=3)
        )
        [alone] = generation._replicas.workers.get_all_worker_results([alone])
        assert_same(both, alone)
        assert_same(both, torch_results(model, seed=4, num_generations=3))
        assert (both.logprobs - reference_logprobs(model, both)).abs().max() < 1e-4
        prompts = batch(model, *"abcdefghijklmnopqrstuvwxyz")
        undisturbed = generation.generate(prompts, seed=0, num_generations=64)
        survivor, victim = [record["pid"] for record in generation.attestation()]
        streams = [generation.stream(prompts, seed=0, num_generations=64) for _ in range(2)]
        started = [next(stream) for stream in streams]
        os.kill(victim, signal.SIGKILL)
        with ThreadPoolExecutor(2) as threads:
            remaining = list(threads.map(list, streams))
        after = [record["pid"] for record in generation.attestation()]
        assert after[0] == survivor
        assert after[1] != victim
        assert generation._replicas._restarts_left == 1
        for first, others in zip(started, remaining, strict=True):
            received = [first, *others]
            positions = [position for part, _ in received for position in part]
            assert sorted(positions) == list(range(26))
            texts = [text for _, piece in received for text in piece.texts]
            expected = [undisturbed.texts[position * 64 : (position + 1) * 64] for position in positions]
            assert texts == [text for group in expected for text in group]


@pytest.mark.parametrize("name", ["llama-tied-bias", "gemma3", "qwen3_moe"])
def test_tensor_parallel_matches_one_worker(cluster, tiny, name: str) -> None:
    model = tiny(name, **WIDE)
    with vllm_generation(cluster, model, options={"tensor_parallel_size": 2}) as generation:
        update = published(model, version=1)
        assert generation.update_weights(update) == update.digest
        result = generation.generate(batch(model), seed=4, num_generations=3)
        assert_same(result, torch_results(model, seed=4, num_generations=3))
        assert (result.logprobs - reference_logprobs(model, result)).abs().max() < 1e-4
        expected = [generation.generate(batch(model), seed=seed) for seed in (4, 5)]
        for pieces, whole in zip([generation.stream(batch(model), seed=seed) for seed in (4, 5)], expected):
            texts = {position: text for positions, piece in pieces for position, text in zip(positions, piece.texts)}
            assert texts == dict(enumerate(whole.texts))
        update = published(model, version=2, scale=1.1)
        assert generation.update_weights(update, in_flight=True) == update.digest
        assert_same(generation.generate(batch(model), seed=3), torch_results(model, seed=3, scale=1.1))
        with pytest.raises(WeightSyncError, match="version 3 arrived damaged"):
            generation.update_weights(dataclasses.replace(published(model, version=3), digest="0" * 32))


def test_dead_rank_of_a_tied_group_raises_worker_error(cluster, tiny) -> None:
    """The other rank waits for the dead one forever; the driver does not wait."""
    model = tiny("llama", **WIDE)
    with vllm_generation(cluster, model, max_restarts=0, options={"tensor_parallel_size": 2}) as generation:
        generation.update_weights(published(model, version=1))
        os.kill(generation.attestation()[1]["pid"], signal.SIGKILL)
        with pytest.raises(WorkerError, match="worker rank 1 .* died during a call"):
            generation.generate(batch(model), seed=0)
        with pytest.raises(WorkerError, match="worker rank 1 .* died during a call"):
            generation.update_weights(published(model, version=2))


@pytest.mark.parametrize(
    "route",
    [Route("ray", "gloo", spans_nodes=True), Route("shared_memory", "shared_memory", spans_nodes=False)],
    ids=["every rank sends to one", "rank 0 sends to all"],
)
def test_tied_ranks_receive_streamed_weights(cluster, tiny, route: Route) -> None:
    """The ranks read back together, bucket by bucket, while their senders gather together, without a deadlock."""
    model = tiny("qwen2", **WIDE)
    model.model.save_pretrained(model.directory)
    config = PolicyConfig(
        sharding="fsdp",
        num_threads=1,
        max_sequence_length=64,
        generation={"backend": "vllm"},
        py_executable=PY_EXECUTABLES.SYSTEM,
    )
    policy = Policy(cluster, config, str(model.directory), total_steps=1, seed=3, route=route)
    try:
        with vllm_generation(cluster, model, options={"tensor_parallel_size": 2}) as generation:
            for version in (1, 2):
                offered = policy.offer_weights(version, "float32")
                assert isinstance(offered, PolicyWeights)
                assert generation.update_weights(offered) == published(model, version).digest
            assert_same(generation.generate(batch(model), seed=4), torch_results(model, seed=4))
    finally:
        policy.shutdown()
