"""Tests the driver's side of generation: the distribution of prompts, and two real workers on real Ray."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import ray
import torch
from tiny_generation import TinyModel, assert_same

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES, RayVirtualCluster
from nemo_rl.errors import ConfigError, ModelError, WeightSyncError, WorkerError, WorkerStartError
from nemo_rl.models.backends import GENERATION_BACKENDS, Backend, generation_backend
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generation import Generation
from nemo_rl.models.generation.replicas import even_parts
from nemo_rl.models.generation.results import join, select
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.weights.sender import publish

TEXTS = ("What is 1+1? ", "a", "37+48=", "ten chars!", "xyz")


def test_parts_are_consecutive_and_even() -> None:
    assert even_parts(5, 2) == [(0, 3), (3, 5)]
    assert even_parts(4, 2) == [(0, 2), (2, 4)]
    assert even_parts(1, 3) == [(0, 1), (1, 1), (1, 1)]


def test_unknown_backend_names_the_nearest_one() -> None:
    assert generation_backend("torch") == GENERATION_BACKENDS["torch"]
    with pytest.raises(ConfigError, match="'torhc' is unknown. Did you mean 'torch'"):
        generation_backend("torhc")


def test_joined_results_are_padded_to_the_longest(tiny) -> None:
    model: TinyModel = tiny("llama")
    generator = model.generator(max_new_tokens=9)
    request = model.request(*TEXTS, seed=0)
    parts = [generator.generate(request.part(start, end)) for start, end in ((0, 1), (1, 3), (3, 5), (5, 5))]
    assert_same(join(parts), generator.generate(request))


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of `wrong_digest_worker`
        start_local_ray(num_cpus=2)
        try:
            cluster = RayVirtualCluster([2], use_gpus=False, max_colocated_worker_groups=2, name="generation")
            yield cluster
            cluster.shutdown()
        finally:
            ray.shutdown()


def test_two_workers_match_one_process(cluster, tiny) -> None:
    model: TinyModel = tiny("llama")
    sampling = GenerationConfig(max_new_tokens=9, num_threads=1)
    config = PolicyConfig(model_name=str(model.directory), generation=sampling, max_sequence_length=64)
    generation = Generation(cluster, config)
    try:
        generation.wait_ready()
        ids, lengths = model.prompts(*TEXTS)
        prompts = BatchedDataDict(input_ids=ids, input_lengths=lengths)
        with pytest.raises(WeightSyncError, match="no weights"):
            generation.generate(prompts, seed=3)
        update = publish(model.model.named_parameters(), version=6, dtype="float32")
        assert generation.update_weights(update) == update.digest
        result = generation.generate(prompts, seed=3, num_generations=2)
        expected = model.generator(max_new_tokens=9).generate(model.request(*TEXTS, seed=3, num_generations=2))
        assert_same(result, expected)
        assert result.weights_version == 6
        pieces = sorted(generation.stream(prompts, seed=3, num_generations=2), key=lambda piece: piece[0])
        assert [position for positions, _ in pieces for position in positions] == list(range(len(TEXTS)))
        assert_same(join([piece for _, piece in pieces]), result)
        with pytest.raises(WeightSyncError, match="version 6 arrived damaged at generation worker"):
            generation.update_weights(dataclasses.replace(update, digest="0" * 32))
        long = BatchedDataDict(input_ids=torch.ones(2, 64, dtype=torch.int64), input_lengths=torch.tensor([1, 64]))
        with pytest.raises(ModelError, match="prompt 1 has 64 tokens"):
            generation.generate(long, seed=0)
        records = generation.attestation()
        assert [record["decoder"] for record in records] == ["LlamaDecoder"] * 2
        assert len({record["pid"] for record in records}) == 2
        assert all(record["num_threads"] == 1 for record in records)
    finally:
        generation.shutdown()
        generation.shutdown()


@pytest.mark.slow  # starts a group of its own
def test_dead_worker_restarts_and_repeats_its_prompts(cluster, tiny) -> None:
    model: TinyModel = tiny("llama")
    sampling = GenerationConfig(max_new_tokens=9, num_threads=1, max_restarts=2)
    generation = Generation(
        cluster, PolicyConfig(model_name=str(model.directory), generation=sampling, max_sequence_length=64)
    )
    try:
        ids, lengths = model.prompts(*TEXTS)
        prompts = BatchedDataDict(input_ids=ids, input_lengths=lengths)
        generation.update_weights(publish(model.model.named_parameters(), version=6, dtype="float32"))
        undisturbed = generation.generate(prompts, seed=3)
        survivor, victim = [record["pid"] for record in generation.attestation()]
        os.kill(victim, signal.SIGKILL)
        assert_same(generation.generate(prompts, seed=3), undisturbed)
        after = generation.attestation()
        assert [record["rank"] for record in after] == [0, 1]
        assert {record["weights_version"] for record in after} == {6}
        assert after[0]["pid"] == survivor
        assert after[1]["pid"] != victim
        os.kill(after[1]["pid"], signal.SIGKILL)
        generation.wake()
        assert [record["weights_version"] for record in generation.attestation()] == [6, 6]
        os.kill(survivor, signal.SIGKILL)
        with pytest.raises(WorkerError, match="worker rank 0 .* died during a call"):
            generation.generate(prompts, seed=3)
    finally:
        generation.shutdown()


def test_shutdown_stops_starting_workers(cluster, tiny) -> None:
    model: TinyModel = tiny("llama")
    generation = Generation(
        cluster,
        PolicyConfig(
            model_name=str(model.directory), generation=GenerationConfig(num_threads=1), max_sequence_length=64
        ),
    )
    generation.shutdown()
    with pytest.raises(WorkerStartError, match="was stopped while it started"):
        generation.wait_ready()


@pytest.mark.slow  # starts a group of its own
def test_driver_detects_a_wrong_digest(cluster, tiny, monkeypatch) -> None:
    fqn = "wrong_digest_worker.WrongDigestWorker"
    monkeypatch.setitem(GENERATION_BACKENDS, "wrong digest", Backend(fqn))
    monkeypatch.setitem(ACTOR_ENVIRONMENT_REGISTRY, fqn, PY_EXECUTABLES.SYSTEM)
    model: TinyModel = tiny("llama")
    sampling = GenerationConfig(backend="wrong digest", num_threads=1)
    generation = Generation(
        cluster, PolicyConfig(model_name=str(model.directory), generation=sampling, max_sequence_length=64)
    )
    try:
        update = publish(model.model.named_parameters(), version=6, dtype="float32")
        with pytest.raises(WeightSyncError, match=f"version 6 .*rank [01] .*{update.digest}.*{'f' * 32}"):
            generation.update_weights(update)
    finally:
        generation.shutdown()


def test_select_rows(tiny) -> None:
    model: TinyModel = tiny("llama")
    result = model.generator(max_new_tokens=9).generate(model.request(*TEXTS, seed=0))
    selected = select(result, [4, 1])
    assert selected.texts == [result.texts[4], result.texts[1]]
    assert torch.equal(selected.logprobs, result.logprobs[[4, 1]])


def test_embedded_model_must_be_built_first(cluster) -> None:
    with pytest.raises(ModelError, match="must be built first"):
        Generation(cluster, PolicyConfig())
