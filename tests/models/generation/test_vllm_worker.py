"""Tests one real vLLM worker in its own venv, against transformers and against the torch backend."""

from __future__ import annotations

import dataclasses
import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from tiny_generation import TinyModel, assert_same, reference_logprobs
from vllm_groups import TEXTS, WIDE, batch, local_cluster, published, torch_results, vllm_generation

from nemo_rl.errors import ModelError, WeightSyncError
from nemo_rl.models.generation.config import SamplingConfig
from nemo_rl.models.generation.generation import Generation
from nemo_rl.models.generation.vllm.config import CPU_HEAD_SIZES
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.models.weights.sender import publish

pytestmark = pytest.mark.slow  # the engine alone starts in most of a minute

# Fewer sequences at a time than most requests here have: rows that end make room for others.
OPTIONS = {"http_port": 0, "max_num_seqs": 32}


@pytest.fixture(scope="module")
def model(tiny) -> TinyModel:
    return tiny("llama", **WIDE)


@pytest.fixture(scope="module")
def worker(model: TinyModel) -> Iterator[Generation]:
    with local_cluster(1) as cluster, vllm_generation(cluster, model, options=OPTIONS) as generation:
        yield generation


@pytest.fixture
def generation(worker: Generation, model: TinyModel) -> Generation:
    worker.update_weights(published(model, version=1))
    return worker


def test_generate_before_weights_is_an_error(worker: Generation, model: TinyModel) -> None:
    """This test comes first: every other test publishes weights."""
    with pytest.raises(WeightSyncError, match="has no weights"):
        worker.generate(batch(model), seed=0)


def test_worker_runs_vllm_in_the_cpu_venv(generation: Generation) -> None:
    [record] = generation.attestation()
    assert record["engine"].startswith("vLLM ")
    assert record["device"] == "cpu"
    assert record["prefix"] != sys.prefix
    assert record["weights_version"] == 1
    assert record["num_threads"] == 1


def test_driver_knows_the_head_sizes_of_vllm(generation: Generation) -> None:
    [record] = generation.attestation()
    [path] = Path(record["prefix"]).glob("lib/python*/site-packages/vllm/v1/attention/backends/cpu_attn.py")
    body = path.read_text(encoding="utf-8").partition("def get_supported_head_sizes(")[2]
    assert body.partition("return ")[2].partition("\n")[0] == str(list(CPU_HEAD_SIZES))


def test_logprobs_match_transformers(generation: Generation, model: TinyModel) -> None:
    result = generation.generate(batch(model), seed=1, num_generations=3)
    assert len(result.texts) == 3 * len(TEXTS)
    assert (result.logprobs - reference_logprobs(model, result)).abs().max() < 1e-4
    assert torch.equal(result.logprobs, result.sampling_logprobs)
    positions = torch.arange(result.output_ids.shape[1])
    inside = (positions >= result.prompt_lengths[:, None]) & (positions < result.output_lengths[:, None])
    assert torch.equal(result.logprobs != 0, inside)


@pytest.mark.parametrize(
    "sampling",
    [None, SamplingConfig(temperature=0.7), SamplingConfig(temperature=1.5, top_k=8, top_p=0.8)],
    ids=["plain", "temperature", "top-k and top-p"],
)
def test_draws_and_logprobs_match_the_torch_backend(
    generation: Generation, model: TinyModel, sampling: SamplingConfig | None
) -> None:
    result = generation.generate(batch(model), seed=5, num_generations=4, sampling=sampling)
    assert_same(result, torch_results(model, seed=5, num_generations=4, sampling=sampling))


def test_greedy_matches_the_torch_backend(generation: Generation, model: TinyModel) -> None:
    result = generation.generate(batch(model), seed=0, greedy=True)
    assert_same(result, torch_results(model, seed=0, greedy=True))
    assert not result.sampling_logprobs.any()


def test_completions_end_at_stop_strings_and_at_the_limit(generation: Generation, model: TinyModel) -> None:
    result = generation.generate(batch(model), seed=2, num_generations=40)
    lengths = result.output_lengths - result.prompt_lengths
    ends = {"stop string": 0, "end of sequence": 0, "limit": 0}
    for row, text in enumerate(result.texts):
        last = int(result.output_ids[row, result.output_lengths[row] - 1])
        if result.truncated[row]:
            assert lengths[row] == 12
            ends["limit"] += 1
        elif last == model.tokenizer.eos_token_id:
            ends["end of sequence"] += 1
        else:
            assert text.endswith("7")
            ends["stop string"] += 1
        assert "7" not in text[:-1]
    assert min(ends.values()) > 0, ends


def test_completion_reaches_the_context_limit(generation: Generation, model: TinyModel) -> None:
    result = generation.generate(batch(model, "x" * 61), seed=0, num_generations=8)
    assert result.output_lengths.max() == 64
    assert result.truncated[result.output_lengths == 64].any()
    with pytest.raises(ModelError, match="prompt 1 has 64 tokens"):
        generation.generate(batch(model, "a", "x" * 64), seed=0)


def test_update_changes_completions(generation: Generation, model: TinyModel) -> None:
    before = generation.generate(batch(model), seed=3)
    update = published(model, version=2, scale=1.1)
    assert generation.update_weights(update) == update.digest
    after = generation.generate(batch(model), seed=3)
    assert after.weights_version == 2
    assert after.texts != before.texts
    assert_same(after, torch_results(model, seed=3, scale=1.1))


def _with_other_bytes(update: WeightUpdate) -> WeightUpdate:
    """Return the update with one byte of its first bucket changed after the digest was computed."""
    first = update.buckets[0]
    changed = ray.get(first.handle).copy()
    changed[0] ^= 1
    return dataclasses.replace(
        update, buckets=(dataclasses.replace(first, handle=ray.put(changed)), *update.buckets[1:])
    )


def test_damaged_weights_are_rejected(generation: Generation, model: TinyModel) -> None:
    with pytest.raises(WeightSyncError, match="version 2 arrived damaged at generation worker 0"):
        generation.update_weights(_with_other_bytes(published(model, version=2)))
    with pytest.raises(WeightSyncError, match="has no weights"):
        generation.generate(batch(model), seed=0)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ],
)
def test_skipped_tensor_fails_the_digest(generation: Generation, model: TinyModel, name: str) -> None:
    """The digest covers the memory that the engine computes with, not the tensors that arrived."""

    def skip(worker, name=name):
        inner = worker.generator.engine.model
        load = type(inner).load_weights
        inner.load_weights = lambda tensors: load(inner, ((n, tensor) for n, tensor in tensors if n != name))

    def restore(worker):
        del worker.generator.engine.model.load_weights

    [handle] = generation._replicas.workers.workers
    ray.get(handle.__ray_call__.remote(skip))
    try:
        with pytest.raises(WeightSyncError, match="version 4 arrived damaged"):
            generation.update_weights(published(model, version=4, scale=1.2))
    finally:
        ray.get(handle.__ray_call__.remote(restore))


def test_other_models_weights_are_rejected_and_old_stay(generation: Generation, model: TinyModel) -> None:
    tensors = dict(model.model.named_parameters())
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(WeightSyncError, match=r"missing model.norm.weight, unknown none"):
        generation.update_weights(publish(missing.items(), version=3, dtype="float32"))
    with pytest.raises(WeightSyncError, match="unknown model.extra"):
        generation.update_weights(
            publish([*tensors.items(), ("model.extra", torch.ones(1))], version=3, dtype="float32")
        )
    with pytest.raises(WeightSyncError, match="bfloat16"):
        generation.update_weights(publish(tensors.items(), version=3, dtype="bfloat16"))
    assert generation.generate(batch(model), seed=0).weights_version == 1


def test_stream_matches_generate(generation: Generation, model: TinyModel) -> None:
    prompts = batch(model, *(f"{number}" for number in range(100)))
    pieces = list(generation.stream(prompts, seed=6))
    assert len(pieces) > 3
    result = generation.generate(prompts, seed=6)
    for positions, piece in pieces:
        assert piece.texts == [result.texts[position] for position in positions]
        width = piece.logprobs.shape[1]
        assert torch.equal(piece.output_ids, result.output_ids[positions, :width])
        assert torch.allclose(piece.logprobs, result.logprobs[positions, :width], atol=1e-5)
    assert sorted(position for positions, _ in pieces for position in positions) == list(range(100))


def test_weights_update_in_flight(generation: Generation, model: TinyModel) -> None:
    prompts = batch(model, *(f"{number}+{number}=" for number in range(10, 90)))
    pieces = generation.stream(prompts, seed=8, num_generations=16)
    first = next(pieces)
    update = published(model, version=9, scale=1.1)
    assert generation.update_weights(update, in_flight=True) == update.digest
    results = [first, *pieces]
    assert sorted(position for positions, _ in results for position in positions) == list(range(80))
    assert {result.weights_version for _, result in results} == {1, 9}
    assert generation.generate(prompts, seed=8).weights_version == 9


def test_caller_can_stop_iterating(generation: Generation, model: TinyModel) -> None:
    pieces = generation.stream(batch(model), seed=6, num_generations=2)
    next(pieces)
    pieces.close()
    assert_same(generation.generate(batch(model), seed=3), torch_results(model, seed=3))


def test_http_requests_work_while_the_job_generates(generation: Generation, model: TinyModel) -> None:
    [record] = generation.attestation()
    question = {"model": str(model.directory), "prompt": TEXTS[0], "temperature": 0, "max_tokens": 12}
    request = urllib.request.Request(
        f"{record['http_url']}/completions",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    prompts = batch(model, *(f"{number}+{number}=" for number in range(10, 90)))
    pieces = generation.stream(prompts, seed=8, num_generations=16)
    next(pieces)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert sum(len(positions) for positions, _ in pieces) > 0
    greedy = generation.generate(batch(model, TEXTS[0]), seed=0, greedy=True)
    assert answer["choices"][0]["text"][: len(greedy.texts[0])] == greedy.texts[0]
