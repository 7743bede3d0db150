"""Tests one real vLLM worker in its own venv, against transformers and against the torch backend."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from tiny_generation import TinyModel, assert_same, reference_logprobs
from vllm_groups import TEXTS, WIDE, batch, local_cluster, published, torch_results, vllm_generation

from nemo_rl.algorithms.episodes import EpisodeCollector
from nemo_rl.algorithms.rollouts import Rollout
from nemo_rl.data.config import DataConfig
from nemo_rl.data.transcripts import TranscriptRenderer
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.distributed.ray_private import connected_node
from nemo_rl.environments.config import EpisodeLimits
from nemo_rl.environments.episode import Environment, Turn
from nemo_rl.environments.episode_host import EpisodeHost
from nemo_rl.errors import ModelError, WeightSyncError
from nemo_rl.models.generation.config import SamplingConfig
from nemo_rl.models.generation.generation import Generation
from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
from nemo_rl.models.generation.vllm.config import CPU_HEAD_SIZES
from nemo_rl.models.policy.config import LoraConfig, PolicyConfig
from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker
from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate
from nemo_rl.models.weights.sender import publish
from nemo_rl.models.weights.stream import WeightStreamer
from nemo_rl.observability.timer import Timer

pytestmark = pytest.mark.slow  # the engine alone starts in most of a minute

# Fewer sequences at a time than most requests here have: rows that end make room for others.
OPTIONS = {"http_port": 0, "max_num_seqs": 32}


@pytest.fixture(scope="module")
def model(tiny) -> TinyModel:
    return tiny("qwen3_moe", **WIDE)  # dense models on vLLM: test_vllm_replicas.py and tests/functional


@pytest.fixture(scope="module")
def worker(model: TinyModel) -> Iterator[Generation]:
    # Two threads, although Ray sets OMP_NUM_THREADS to 1: the engine's thread must use torch's number.
    with local_cluster(1) as cluster, vllm_generation(cluster, model, options=OPTIONS, num_threads=2) as generation:
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
    assert record["num_threads"] == 2


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


def test_adapters_equal_merged_weights(generation: Generation, model: TinyModel, tmp_path: Path) -> None:
    model.model.save_pretrained(tmp_path)
    lora = LoraConfig(rank=4, target_modules=[f"{name}_proj" for name in "qkvo"])  # experts have no adapters
    config = PolicyConfig(model_name=str(tmp_path), num_threads=1, max_sequence_length=64, lora=lora)
    policy = TorchPolicyWorker(config, total_steps=1, seed=3, device_type="cpu", weight_transport="ray")
    adapters = [parameter for parameter in policy._model.module.parameters() if parameter.requires_grad]
    for version in (2, 3):
        with torch.no_grad():
            for parameter in adapters:
                parameter.normal_(std=0.02 * version)
        update = policy.publish_adapters(version, "float32")
        assert update is not None
        assert sum(bucket.num_bytes for bucket in update.buckets) == sum(4 * p.numel() for p in adapters)
        assert generation.update_weights(update, in_flight=version == 3) == update.digest
        by_adapters = generation.generate(batch(model), seed=3, num_generations=2)
        merged = policy.publish_weights(version, "float32")
        assert merged is not None
        generation.update_weights(merged)
        by_weights = generation.generate(batch(model), seed=3, num_generations=2)
        assert torch.equal(by_adapters.output_ids, by_weights.output_ids)
        assert torch.equal(by_adapters.logprobs, by_weights.logprobs)
    with pytest.raises(WeightSyncError, match="version 3 arrived damaged at the receiver"):
        generation.update_weights(dataclasses.replace(update, digest="0" * 32))


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
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.gate.weight",
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


def streamed(handle: Any, streamer: WeightStreamer, model: TinyModel, version: int, scale: float) -> None:
    """Stream the model's weights, each times `scale`, from this process to a worker."""
    address, key = streamer.endpoint()
    tensors = [(name, parameter.detach() * scale) for name, parameter in model.model.named_parameters()]
    stream = WeightStream(version, "shared_memory", address, key, version, 0)
    with ThreadPoolExecutor(1) as threads:
        how = {"version": version, "dtype": "float32", "stream": version, "receivers": [0]}
        sent = threads.submit(streamer.send, tensors, **how)
        assert ray.get(handle.update_weights.remote(stream)) == sent.result(60)


def test_streams_are_written_to_the_engines_memory(generation: Generation, model: TinyModel) -> None:
    """The first update has shown which memory holds which parameter, so vLLM's loaders have nothing to do."""

    def refuse(worker):
        def load_weights(tensors):
            raise AssertionError("a loader was called")

        worker.generator.engine.model.load_weights = load_weights

    def restore(worker):
        del worker.generator.engine.model.load_weights

    [handle] = generation._replicas.workers.workers
    ray.get(handle.__ray_call__.remote(refuse))
    try:
        streamed(handle, WeightStreamer(), model, version=5, scale=1.3)
    finally:
        ray.get(handle.__ray_call__.remote(restore))
    by_stream = generation.generate(batch(model), seed=2)
    assert by_stream.weights_version == 5
    generation.update_weights(published(model, version=6, scale=1.3))
    by_loaders = generation.generate(batch(model), seed=2)
    assert torch.equal(by_stream.output_ids, by_loaders.output_ids)
    assert torch.equal(by_stream.logprobs, by_loaders.logprobs)


def test_stream_to_replaced_memory_fails_the_digest(generation: Generation, model: TinyModel) -> None:
    """The memory that was checked at the first update is not what the engine computes with any more."""

    def replace(worker):
        parameter = worker.generator.engine.model.model.norm.weight
        worker.before = parameter.data
        parameter.data = parameter.data.clone()

    def restore(worker):
        worker.generator.engine.model.model.norm.weight.data = worker.before

    [handle] = generation._replicas.workers.workers
    ray.get(handle.__ray_call__.remote(replace))
    try:
        with pytest.raises(ray.exceptions.RayTaskError, match="version 7 arrived damaged"):
            streamed(handle, WeightStreamer(), model, version=7, scale=1.4)
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


# --- several calls at a time ------------------------------------------------------------------------------------------


@pytest.fixture
def in_worker(generation: Generation) -> Callable[[Callable[[Any], Any]], Any]:
    """Return a function that calls a function in the worker's process, with the worker."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the worker cannot import this module
    [handle] = generation._replicas.workers.workers
    return lambda function: ray.get(handle.__ray_call__.remote(function))


def many_prompts(model: TinyModel) -> BatchedDataDict:
    return batch(model, *(f"{number}+{number}=" for number in range(10, 90)))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _set_paused(worker: Any, paused: bool) -> None:
    """Let calls arrive, but let no step run."""
    with worker.generator.engine.turn():
        worker.generator.engine.set_loaded(not paused)


def _is_busy(worker: Any) -> bool:
    with worker.generator.engine.turn():
        return worker.generator.engine.is_busy


def _num_calls(worker: Any) -> int:
    return len(worker.generator._calls)


@pytest.fixture
def start_together(generation: Generation, in_worker) -> Iterator[Callable[..., list[Iterator]]]:
    """Return a function that starts streams, given by prompts and seed, in this order and before the first step."""

    def start(*calls: tuple[BatchedDataDict, int]) -> list[Iterator]:
        in_worker(lambda worker: _set_paused(worker, True))
        streams: list[Iterator] = []
        for prompts, seed in calls:
            streams.append(generation.stream(prompts, seed=seed))
            wait_until(lambda: in_worker(_num_calls) == len(streams))
        return streams

    yield start
    in_worker(lambda worker: _set_paused(worker, False))


def whole(pieces: Iterator, width: int = 64) -> tuple[list[str], torch.Tensor, list[int]]:
    """Return the texts, log-probabilities and versions of a stream, in the order of its prompts."""
    rows = []
    for positions, piece in pieces:
        logprobs = torch.nn.functional.pad(piece.logprobs, (0, width - piece.logprobs.shape[1]))
        rows += [
            (position, text, row, piece.weights_version)
            for position, text, row in zip(positions, piece.texts, logprobs, strict=True)
        ]
    rows.sort(key=lambda row: row[0])
    assert [position for position, *_ in rows] == list(range(len(rows)))
    return [text for _, text, *_ in rows], torch.stack([row for _, _, row, _ in rows]), [row[-1] for row in rows]


def assert_same_rows(pieces: Iterator, expected: GenerationResult) -> None:
    texts, logprobs, _ = whole(pieces, expected.logprobs.shape[1])
    assert texts == expected.texts
    assert torch.allclose(logprobs, expected.logprobs, atol=1e-5)


def numbers(model: TinyModel, *bounds: int) -> BatchedDataDict:
    return batch(model, *map(str, range(*bounds)))


def test_streams_at_a_time_return_what_they_return_alone(
    generation: Generation, model: TinyModel, in_worker, start_together
) -> None:
    assert generation.max_concurrent_calls >= 3
    calls = [(numbers(model, 40), 6), (numbers(model, 100, 130), 7), (numbers(model, 20), 6)]
    alone = [generation.generate(prompts, seed=seed) for prompts, seed in calls]
    streams = start_together(*calls)
    in_worker(lambda worker: _set_paused(worker, False))
    with ThreadPoolExecutor(len(calls)) as threads:
        for pieces, expected in zip(threads.map(list, streams), alone, strict=True):
            assert_same_rows(iter(pieces), expected)


def test_cancelled_call_does_not_disturb_others(
    generation: Generation, model: TinyModel, in_worker, start_together
) -> None:
    expected = generation.generate(numbers(model, 20), seed=6)
    [stream] = start_together((numbers(model, 20), 6))
    request = GenerationRequest.for_prompts(many_prompts(model), seed=1)

    def start_and_cancel(worker: Any) -> bool:
        pieces = worker.generator.stream(request)
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(next, pieces)
            while _num_calls(worker) < 2:
                time.sleep(0.01)
            _set_paused(worker, False)
            first.result()
        pieces.close()
        return _num_calls(worker) < 2

    assert in_worker(start_and_cancel)
    assert_same_rows(stream, expected)
    assert not in_worker(_is_busy)


def test_weights_in_flight_reach_all_calls(generation: Generation, model: TinyModel, in_worker, start_together) -> None:
    """The first call fills 20 of the 32 places; most of the second one's rows start after the update."""
    streams = start_together((numbers(model, 20), 6), (numbers(model, 60), 7))

    def step(worker: Any) -> None:
        with worker.generator.engine.turn():
            for _ in range(3):
                worker.generator.engine.step()

    in_worker(step)
    generation.update_weights(published(model, version=9, scale=1.1), in_flight=True)
    (_, _, first), (texts, _, second) = map(whole, streams)
    assert first == [1] * 20
    assert second[:12] == [1] * 12
    assert second[50:] == [9] * 10
    after = generation.generate(numbers(model, 60), seed=7)
    assert [text for text, version in zip(texts, second) if version == 9] == [
        text for text, version in zip(after.texts, second) if version == 9
    ]


def test_failed_update_in_flight_ends_all_calls(generation: Generation, model: TinyModel, start_together) -> None:
    streams = start_together((numbers(model, 20), 6), (numbers(model, 30), 7))
    with pytest.raises(WeightSyncError, match="version 2 arrived damaged"):
        generation.update_weights(_with_other_bytes(published(model, version=2)), in_flight=True)
    for stream in streams:
        with pytest.raises(WeightSyncError, match="lost its weights: an update during the call failed"):
            list(stream)


def test_other_updates_wait_for_all_calls(generation: Generation, model: TinyModel, in_worker, start_together) -> None:
    streams = start_together((numbers(model, 20), 6), (numbers(model, 60), 7))

    def is_updating() -> bool:
        if generation._replicas._changing.acquire(blocking=False):
            generation._replicas._changing.release()
            return False
        return True

    with ThreadPoolExecutor(1) as thread:
        update = thread.submit(generation.update_weights, published(model, version=9, scale=1.1))
        try:
            wait_until(is_updating)
        finally:
            in_worker(lambda worker: _set_paused(worker, False))
        late = generation.stream(numbers(model, 5), seed=6)
        assert {version for stream in streams for version in whole(stream)[2]} == {1}
        assert update.result(600)
        assert whole(late)[2] == [9] * 5


class Game(Environment):
    """One to three turns, which take the longer the higher the seed."""

    def reset(self, problem: dict[str, Any]) -> str:
        self.seed, self.turn = problem["seed"], 0
        return f"{self.seed}="

    def step(self, action: str) -> Turn:
        time.sleep(0.02 * self.seed)
        self.turn += 1
        return Turn(float(len(action)), f"{len(action)}+", done=self.turn > self.seed % 3)


@dataclass
class OneAtATime:
    """Runs one call of a generation at a time."""

    generation: Generation
    max_concurrent_calls = 1

    def stream(self, *arguments: Any, **options: Any) -> Iterator:
        return self.generation.stream(*arguments, **options)


def test_overlapping_waves_do_not_change_the_draws(generation: Generation, model: TinyModel) -> None:
    seeds = range(9)
    problems = BatchedDataDict(
        input_ids=torch.zeros(len(seeds), 1, dtype=torch.int64),
        input_lengths=torch.zeros(len(seeds), dtype=torch.int64),
        problem_index=torch.tensor(seeds),
        question=[""] * len(seeds),
        answer=[""] * len(seeds),
        metadata=[{}] * len(seeds),
    )

    def collect(chosen: Any) -> Rollout:
        host = EpisodeHost(f"{__name__}.Game", {})
        renderer = TranscriptRenderer(model.tokenizer, DataConfig(), has_turns=True)
        collector = EpisodeCollector(
            {"game": host}, {"game": EpisodeLimits()}, chosen, renderer, max_sequence_length=64, pad_token_id=0
        )
        try:
            return collector.collect(problems, num_generations=3, seed=5, timer=Timer())
        finally:
            collector.close()
            host.shutdown()

    overlapping, separate = collect(generation), collect(OneAtATime(generation))
    assert overlapping.completions == separate.completions
    assert len(set(overlapping.completions)) > 9
    for key in ("input_ids", "turn_index", "generation_logprobs"):
        torch.testing.assert_close(overlapping.batch[key], separate.batch[key])


# --- HTTP ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """A client of the worker's HTTP server, with the token that the worker has generated."""

    base: str
    model: str
    token: str

    def send(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> Any:
        """Send a request; returns the JSON of the answer, or raises `HTTPError`."""
        request = urllib.request.Request(
            self.base + path,
            data=None if body is None else json.dumps({"model": self.model, **body}).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.token}", **headers},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def complete(self, prompt: str = TEXTS[0], *, max_tokens: int = 12, **more: Any) -> str:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens, **more}
        text: str = self.send("/v1/completions", body)["choices"][0]["text"]
        return text


@pytest.fixture
def client(generation: Generation, model: TinyModel) -> Client:
    [record] = generation.attestation()
    token = Path(record["http_token_file"]).read_text()
    return Client(record["http_url"].removesuffix("/v1"), str(model.directory), token)


def test_http_requests_work_while_the_job_generates(generation: Generation, model: TinyModel, client: Client) -> None:
    pieces = generation.stream(many_prompts(model), seed=8, num_generations=16)
    next(pieces)
    text = client.complete()
    assert sum(len(positions) for positions, _ in pieces) > 0
    greedy = generation.generate(batch(model, TEXTS[0]), seed=0, greedy=True)
    assert text[: len(greedy.texts[0])] == greedy.texts[0]


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations", "/tokenize", "/metrics", "/health", "/ping"])
@pytest.mark.parametrize("authorization", ["", "Bearer guessed"])
def test_http_without_the_token_is_rejected(client: Client, path: str, authorization: str) -> None:
    body = None if path in ("/metrics", "/health", "/ping") else {"prompt": TEXTS[0]}
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.send(path, body, Authorization=authorization)
    assert refused.value.code == 401


def test_token_is_in_no_record(generation: Generation, client: Client) -> None:
    [record] = generation.attestation()
    assert client.token not in json.dumps(record)
    assert stat.S_IMODE(Path(record["http_token_file"]).stat().st_mode) == 0o600
    session = Path(connected_node().get_session_dir_path())
    for log in (session / "logs").rglob("*"):
        if log.is_file():
            assert client.token.encode() not in log.read_bytes()


@pytest.mark.parametrize("values", [(0, 3, 1279), (1280, -1, "0", 0.0, [0])], ids=["rows of the job", "other values"])
def test_http_request_cannot_name_a_row_of_the_job(
    generation: Generation, model: TinyModel, client: Client, values: tuple[Any, ...]
) -> None:
    """Neither the job's log-probabilities nor its completions change, and no thread fails."""
    prompts = many_prompts(model)
    expected = generation.generate(prompts, seed=8, num_generations=16)
    pieces = generation.stream(prompts, seed=8, num_generations=16)
    first = next(pieces)

    def ask(value: Any) -> None:
        client.complete("9" * 20, vllm_xargs={"nemo_rl_row": value})
        client.complete("9" * 20, vllm_xargs={"nemo_rl_row": value}, temperature=1, seed=1, n=2)

    with ThreadPoolExecutor(len(values)) as threads:
        list(threads.map(ask, values))  # while the job generates
    results = {tuple(positions): piece for positions, piece in [first, *pieces]}
    assert sorted(position for positions in results for position in positions) == list(range(80))
    for positions, piece in results.items():
        rows = [position * 16 + g for position in positions for g in range(16)]
        assert piece.texts == [expected.texts[row] for row in rows]
        width = piece.logprobs.shape[1]
        assert torch.allclose(piece.logprobs, expected.logprobs[rows, :width], atol=1e-4)


def test_http_requests_with_equal_ids_are_answered(client: Client, in_worker) -> None:
    """The ids that clients choose are not the engine's: both requests end, and so does nothing else."""

    def ask(prompt: str) -> str:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 12}
        return client.send("/v1/completions", body, **{"X-Request-Id": "same"})["choices"][0]["text"]

    prompts = [f"{number}-" for number in range(8)]
    alone = [client.complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(ask, prompts)) == alone
    assert not in_worker(lambda worker: worker.generator.engine.is_busy)


def test_refused_http_request_leaves_nothing_in_the_engine(client: Client, in_worker) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.complete("x" * 200)
    assert refused.value.code == 400
    assert not in_worker(lambda worker: worker.generator.engine.is_busy)


@pytest.fixture
def sleeping(generation: Generation, in_worker) -> Iterator[None]:
    """Let the engine sleep as on a GPU that the policy shares. On CPUs, this releases no memory. All else is equal."""

    def set_sleep_mode(worker: Any, enabled: bool) -> None:
        worker.generator.engine.llm.model_config.enable_sleep_mode = enabled

    in_worker(lambda worker: set_sleep_mode(worker, True))
    yield
    generation.wake()
    in_worker(lambda worker: set_sleep_mode(worker, False))


@contextlib.contextmanager
def client_thread(generation: Generation, model: TinyModel) -> Iterator[ThreadPoolExecutor]:
    """Run a client in a thread. If the test fails, end what its request may wait for."""
    with ThreadPoolExecutor(1) as thread:
        try:
            yield thread
        except BaseException:
            generation.wake()
            generation.update_weights(published(model, version=1))
            raise


def _start_and_sleep(worker: Any, level: int) -> int:
    """Compute the first tokens of the waiting requests, and sleep again. Returns the number of running requests."""
    engine = worker.generator.engine
    with engine.turn():
        engine.wake(None)
        for _ in range(3):
            engine.step()
        running = len(engine.llm.engine_core.engine_core.scheduler.running)
        engine.sleep(level)
        return running


def _is_idle(worker: Any) -> bool:
    """Return whether the thread that steps for HTTP requests waits for an event."""
    engine = worker.generator.engine
    return not engine._step_needed.is_set() and not engine.needs_step


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("in_flight", [False, True], ids=["waiting", "in flight"])
def test_http_requests_wait_while_generation_sleeps(
    generation: Generation, model: TinyModel, client: Client, in_worker, sleeping, level: int, in_flight: bool
) -> None:
    expected = client.complete(max_tokens=40)
    generation.sleep(level)
    with pytest.raises(WeightSyncError, match="is asleep" if level == 1 else "has no weights"):
        generation.generate(batch(model), seed=0)
    with client_thread(generation, model) as thread:
        answer = thread.submit(client.complete, max_tokens=40)
        wait_until(lambda: in_worker(_is_busy))
        if in_flight:
            assert in_worker(lambda worker: _start_and_sleep(worker, level)) == 1
        assert in_worker(_is_idle)
        generation.wake(["weights"])
        if level == 2:
            generation.update_weights(published(model, version=2))
        assert in_worker(_is_idle)
        assert not answer.done()
        generation.wake(["kv_cache"])
        assert answer.result(600) == expected
    assert in_worker(_is_idle)
    assert not in_worker(_is_busy)


def test_http_requests_survive_a_failed_update(
    generation: Generation, model: TinyModel, client: Client, in_worker, sleeping
) -> None:
    expected = client.complete()
    generation.sleep(1)
    with client_thread(generation, model) as thread:
        answer = thread.submit(client.complete)
        wait_until(lambda: in_worker(_is_busy))
        with pytest.raises(WeightSyncError, match="arrived damaged"):
            generation.update_weights(_with_other_bytes(published(model, version=2)))
        generation.wake()
        assert in_worker(_is_idle)
        generation.update_weights(published(model, version=3))
        assert answer.result(600) == expected


def test_http_request_of_a_client_that_has_left_is_cancelled(
    generation: Generation, client: Client, in_worker, sleeping
) -> None:
    generation.sleep(1)
    host, port = client.base.removeprefix("http://").split(":")
    body = json.dumps({"model": client.model, "prompt": TEXTS[0], "max_tokens": 12}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {client.token}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: in_worker(_is_busy))
    wait_until(lambda: not in_worker(_is_busy))


def test_failed_step_ends_http_requests_and_the_job(
    generation: Generation, model: TinyModel, client: Client, in_worker
) -> None:
    """This test comes last: the engine cannot be used afterwards."""

    def break_engine(worker: Any) -> None:
        def fail() -> None:
            raise RuntimeError("the device is gone")

        worker.generator.engine.llm.step = fail

    in_worker(break_engine)
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError) as failed:
            client.complete()
        assert failed.value.code == 500
    with pytest.raises(ModelError, match="the device is gone"):
        generation.generate(batch(model), seed=0)
