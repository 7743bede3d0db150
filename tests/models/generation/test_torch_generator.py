"""The sampling loop on real tiny models, against transformers."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_generation import CONFIGS, reference_logprobs

from nemo_rl.errors import ModelError, WeightSyncError
from nemo_rl.models.generation.config import GenerationConfig, SamplingConfig
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
from nemo_rl.models.generation.torch.generator import TorchGenerator, row_parts
from nemo_rl.models.generation.torch.hf_decoder import HFDecoder
from nemo_rl.models.generation.torch.llama_decoder import LlamaDecoder
from nemo_rl.models.weights.digest import digest_tensors

TEXTS = ("What is 1+1? ", "a", "37+48=", "What is 1+1? ", "ten chars!")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logprobs_match_transformers(tiny, name: str) -> None:
    model = tiny(name)
    generator = model.generator(max_new_tokens=12)
    assert isinstance(generator.decoder, HFDecoder if name in ("gemma3", "gpt2", "qwen3_moe") else LlamaDecoder)
    result = generator.generate(model.request(*TEXTS, seed=1, num_generations=3))
    assert len(result.texts) == 3 * len(TEXTS)
    assert (result.logprobs - reference_logprobs(model, result)).abs().max() < 1e-4
    assert torch.equal(result.logprobs, result.sampling_logprobs)
    completed = result.logprobs != 0
    positions = torch.arange(result.output_ids.shape[1])
    inside = (positions >= result.prompt_lengths[:, None]) & (positions < result.output_lengths[:, None])
    assert torch.equal(completed, inside)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.5}, {"temperature": 1.5}, {"temperature": 1.5, "top_k": 8, "top_p": 0.8}], ids=str
)
def test_logprobs_have_the_temperature(tiny, sampling: dict[str, Any]) -> None:
    model = tiny("llama")
    result = model.generator(max_new_tokens=12, **sampling).generate(model.request(*TEXTS, seed=1, num_generations=3))
    expected = reference_logprobs(model, result, sampling["temperature"])
    assert (result.logprobs - expected).abs().max() < 1e-4
    assert (result.logprobs <= result.sampling_logprobs).all()
    assert torch.equal(result.logprobs, result.sampling_logprobs) == ("top_k" not in sampling)
    assert (result.logprobs - reference_logprobs(model, result)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_greedy_matches_transformers(tiny, name: str) -> None:
    model = tiny(name)
    result = model.generator(max_new_tokens=10).generate(model.request(*TEXTS, seed=0, greedy=True))
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        expected = model.model.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=0)[0]
        assert result.output_ids[row, : result.output_lengths[row]].tolist() == expected.tolist()
    assert not result.sampling_logprobs.any()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_bfloat16_is_close_to_transformers(tiny, name: str) -> None:
    import copy

    model = tiny(name)
    generator = model.generator(max_new_tokens=8, precision="bfloat16")
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in generator.decoder.named_tensors())
    result = generator.generate(model.request(*TEXTS, seed=1, num_generations=2))
    half = dataclasses.replace(model, model=copy.deepcopy(model.model).to(torch.bfloat16))
    difference = (result.logprobs - reference_logprobs(half, result).float())[result.logprobs != 0].abs()
    assert difference.mean() < 0.1


def test_draws_are_independent_of_batch_splits(tiny) -> None:
    model = tiny("llama")
    request = model.request(*TEXTS, seed=7, num_generations=2)
    generator = model.generator(max_new_tokens=10)
    result = generator.generate(request)
    in_batches = model.generator(max_new_tokens=10, max_batch_size=3).generate(request)
    parts = [generator.generate(request.part(start, end)) for start, end in ((0, 2), (2, 5))]
    assert in_batches.texts == result.texts
    assert parts[0].texts + parts[1].texts == result.texts
    other_seed = generator.generate(model.request(*TEXTS, seed=8, num_generations=2))
    assert other_seed.texts != result.texts
    assert len(set(result.texts)) > len(TEXTS)  # copies of one prompt draw differently


def test_threads_complete_their_own_rows(tiny) -> None:
    model = tiny("llama")
    request = model.request(*TEXTS, seed=7, num_generations=7)
    alone, divided = model.generator(max_new_tokens=10), model.generator(max_new_tokens=10)
    before = torch.get_num_threads()
    try:
        divided.use_threads(3)
        assert row_parts(35, 7, 3) == [slice(0, 7), slice(7, 21), slice(21, 35)]
        assert divided.attestation()["num_threads"] == 3
        expected, result = alone.generate(request), divided.generate(request)
    finally:
        torch.set_num_threads(before)
    assert result.texts == expected.texts
    torch.testing.assert_close(result.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(num_rows=st.integers(1, 80), group=st.integers(1, 9), num_threads=st.integers(1, 5))
def test_parts_cover_all_rows_and_keep_groups_together(num_rows: int, group: int, num_threads: int) -> None:
    parts = row_parts(num_rows, group, num_threads)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num_rows))
    assert all(part.start % group == 0 for part in parts)
    assert len(parts) <= num_threads
    assert len(parts) == 1 or num_rows >= 8 * len(parts)


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "qwen2", "qwen3"])
@pytest.mark.parametrize("greedy", [False, True])
def test_python_completes_as_torchscript_does(tiny, monkeypatch: pytest.MonkeyPatch, name: str, greedy: bool) -> None:
    model = tiny(name)
    request = model.request(*TEXTS, seed=7, num_generations=2, greedy=greedy)
    scripted = model.generator(max_new_tokens=10)
    monkeypatch.delattr(torch.jit, "script")  # as in a version of torch without TorchScript
    plain = model.generator(max_new_tokens=10)
    assert scripted.decoder.runs_without_interpreter
    assert not plain.decoder.runs_without_interpreter
    before = torch.get_num_threads()
    try:
        plain.use_threads(4)
        assert torch.get_num_threads() == 1  # several threads would wait for the interpreter
        expected, result = plain.generate(request), scripted.generate(request)
    finally:
        torch.set_num_threads(before)
    assert result.texts == expected.texts
    torch.testing.assert_close(result.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


def test_results_survive_pickling(tiny) -> None:
    result = tiny("qwen3").generator(max_new_tokens=4).generate(tiny("qwen3").request(*TEXTS, seed=7))
    for field in dataclasses.fields(GenerationResult):
        a, b = getattr(result, field.name), getattr(pickle.loads(pickle.dumps(result)), field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def test_rows_name_the_random_streams(tiny) -> None:
    model = tiny("llama")
    request = model.request(*TEXTS, seed=7)
    generator = model.generator(max_new_tokens=10)
    expected = generator.generate(request).texts
    order = [4, 0, 2, 3, 1]
    shuffled = dataclasses.replace(
        request,
        input_ids=request.input_ids[order],
        input_lengths=request.input_lengths[order],
        rows=tuple(order),
    )
    assert generator.generate(shuffled).texts == [expected[row] for row in order]
    assert generator.generate(shuffled.part(1, 3)).texts == [expected[row] for row in order[1:3]]
    with pytest.raises(ValueError, match="got 5 rows, 5 prompts and num_generations=2"):
        dataclasses.replace(shuffled, num_generations=2)


def test_repeated_request_is_bit_identical(tiny) -> None:
    model = tiny("qwen2")
    generator = model.generator(max_new_tokens=10)
    first, second = (generator.generate(model.request(*TEXTS, seed=3, num_generations=4)) for _ in range(2))
    for field in dataclasses.fields(GenerationResult):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_stop_tokens_end_completions_and_stay_in_them(tiny) -> None:
    model = tiny("llama")
    free = model.generator(max_new_tokens=30)
    result = free.generate(model.request("37+48=", seed=0, num_generations=64))
    ended = ~result.truncated
    assert ended.any()
    assert result.truncated.any()
    last = result.output_ids.gather(1, result.output_lengths[:, None] - 1)[:, 0]
    assert (last[ended] == 2).all()
    assert (result.output_lengths - result.prompt_lengths)[result.truncated].eq(30).all()
    # Make a token of some completion a stop token: completions stay the same up to that token.
    stop = int(result.output_ids[0, result.prompt_lengths[0] + 3])
    stopped = model.generator(max_new_tokens=30, stop_token_ids=[stop]).generate(
        model.request("37+48=", seed=0, num_generations=64)
    )
    for row in range(64):
        start, end = int(result.prompt_lengths[row]), int(result.output_lengths[row])
        tokens = result.output_ids[row, start:end].tolist()
        expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert stopped.output_ids[row, start : int(stopped.output_lengths[row])].tolist() == expected


def test_stop_string_ends_completion_at_first_match(tiny) -> None:
    model = tiny("llama")
    request = model.request("37+48=", "a", seed=0, num_generations=32)
    free = model.generator(max_new_tokens=30).generate(request)
    string = free.texts[0][3:5]
    assert len(string) == 2
    stopped = model.generator(max_new_tokens=30, stop_strings=[string]).generate(request)
    expected = [text[: text.find(string) + 2] if string in text else text for text in free.texts]
    assert stopped.texts == expected
    assert not stopped.truncated[0]


def test_each_row_ends_at_its_context_limit(tiny) -> None:
    model = tiny("qwen3")
    generator = model.generator(max_new_tokens=20, max_sequence_length=16)
    result = generator.generate(model.request("0123456789", "01234", "0123456789abcde", seed=0, num_generations=8))
    assert result.output_lengths.max() == 16
    assert result.truncated.view(3, 8)[2].sum() == (result.output_ids[16:, 15] != 2).sum()
    assert (result.output_lengths[result.truncated] == 16).all()
    assert (result.logprobs - reference_logprobs(model, result)).abs().max() < 1e-4


def test_request_overrides_sampling(tiny) -> None:
    model = tiny("llama")
    generator = model.generator(max_new_tokens=8)
    top_1 = SamplingConfig(temperature=1.0, top_k=1)
    cold = generator.generate(model.request(*TEXTS, seed=0, sampling=top_1))
    assert cold.texts == generator.generate(model.request(*TEXTS, seed=9, greedy=True)).texts
    assert cold.sampling_logprobs.abs().max() < 1e-6
    assert cold.logprobs.min() < -0.01


def test_prompt_without_room_is_rejected_by_position(tiny) -> None:
    generator = tiny("llama").generator(max_sequence_length=8)
    with pytest.raises(ModelError, match="prompt 5 has 8 tokens"):
        generator.generate(
            GenerationRequest(torch.ones(3, 9, dtype=torch.int64), torch.tensor([7, 8, 9]), seed=0, first_prompt=4)
        )
    with pytest.raises(ModelError, match="prompt 0 is empty"):
        generator.generate(GenerationRequest(torch.ones(1, 9, dtype=torch.int64), torch.tensor([0]), seed=0))


def test_empty_request_gives_empty_result(tiny) -> None:
    request = GenerationRequest(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0).long(), seed=0)
    result = tiny("llama").generator().generate(request)
    assert result.texts == []
    assert result.output_ids.shape[0] == 0


def test_generate_before_weights_is_an_error(tiny) -> None:
    model = tiny("llama")
    generator = model.generator(loaded=False)
    with pytest.raises(WeightSyncError, match="update_weights before generate"):
        generator.generate(model.request("a", seed=0))
    assert generator.update_weights(model.publish(version=4)) == model.publish().digest
    assert generator.generate(model.request("a", seed=0)).weights_version == 4


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_damaged_weights_are_rejected(tiny, name: str) -> None:
    model = tiny(name)
    generator = model.generator()
    update = model.publish(version=8)
    update.buckets[0].handle[1000] ^= 4
    with pytest.raises(WeightSyncError, match=f"version 8 .*{update.digest}"):
        generator.update_weights(update)
    with pytest.raises(WeightSyncError, match="no weights"):
        generator.generate(model.request("a", seed=0))
    generator.update_weights(model.publish(version=9))
    assert generator.version == 9


def test_weights_of_another_model_are_rejected(tiny) -> None:
    with pytest.raises(WeightSyncError, match="missing lm_head.weight"):
        tiny("llama").generator(loaded=False).update_weights(tiny("llama-tied-bias").publish())
    with pytest.raises(WeightSyncError, match="unknown model.layers.0.self_attn.q_norm.weight"):
        tiny("llama3-rope").generator(loaded=False).update_weights(tiny("qwen3").publish())


def test_adjacent_weights_are_fused_as_views(tiny) -> None:
    model = tiny("llama")
    update = model.publish()
    generator = model.generator(loaded=False)
    generator.update_weights(update)
    start = update.buckets[0].handle.data_ptr()
    shared = range(start, start + update.buckets[0].num_bytes)
    decoder = generator.decoder
    assert all(tensor.data_ptr() in shared for _, tensor in decoder.named_tensors())
    layer = decoder._weights.layers[1]
    assert layer.qkv.data_ptr() in shared
    assert layer.gate_up.data_ptr() in shared
    tensors = dict(decoder.named_tensors())
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(parts))


@pytest.mark.parametrize(("name", "bucket_bytes"), [("qwen2", 1 << 20), ("llama", 3000)])
def test_separate_weights_are_copied_and_still_checked(tiny, name: str, bucket_bytes: int) -> None:
    model = tiny(name)
    generator = model.generator(loaded=False, max_new_tokens=8)
    update = model.publish(bucket_bytes=bucket_bytes)
    assert generator.update_weights(update) == update.digest
    tensors = dict(generator.decoder.named_tensors())
    fused = generator.decoder._weights.layers[0].qkv
    assert tensors["model.layers.0.self_attn.k_proj.weight"].untyped_storage().data_ptr() == fused.data_ptr()
    fused[-1, -1] += 1
    assert digest_tensors(generator.decoder.named_tensors()) != update.digest


def test_non_finite_logits_are_an_error(tiny) -> None:
    model = tiny("llama")
    generator = model.generator(loaded=False)
    tensors = {name: tensor.detach().clone() for name, tensor in model.model.named_parameters()}
    tensors["lm_head.weight"][3] = float("nan")
    from nemo_rl.models.weights.sender import publish

    generator.update_weights(publish(tensors.items(), version=2, dtype="float32", transport="local"))
    with pytest.raises(ModelError, match="version 2 produces non-finite logits"):
        generator.generate(model.request("a", seed=0))


@pytest.mark.parametrize(
    ("configured", "expected"),
    [([5, 6], {2, 5, 6}), (5, {2, 5}), ([], {2}), (None, {2}), ("absent", {2}), ("no file", {2})],
    ids=str,
)
def test_generation_config_ends_completions(tiny, tmp_path: Path, configured: Any, expected: set[int]) -> None:
    """The token that ends a turn of a chat model may be in `generation_config.json` only."""
    model = tiny("llama")
    directory = shutil.copytree(model.directory, tmp_path / "model")
    path = directory / "generation_config.json"
    path.unlink(missing_ok=True)
    if configured != "no file":
        path.write_text(json.dumps({} if configured == "absent" else {"eos_token_id": configured, "temperature": 0.1}))
    generator = TorchGenerator(GeneratorSpec(str(directory), GenerationConfig(max_new_tokens=12), 64))
    assert generator.stop.token_ids == expected
    generator.update_weights(model.publish())
    result = generator.generate(model.request(*TEXTS, seed=1, num_generations=8))
    for row, (start, end) in enumerate(zip(result.prompt_lengths.tolist(), result.output_lengths.tolist())):
        completion = result.output_ids[row, start:end].tolist()
        assert not expected & set(completion[:-1])
        assert result.truncated[row] == (completion[-1] not in expected)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [-1]}', "\xff"])
def test_damaged_generation_config_is_refused(tiny, tmp_path: Path, content: str) -> None:
    directory = shutil.copytree(tiny("llama").directory, tmp_path / "model")
    (directory / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        TorchGenerator(GeneratorSpec(str(directory), GenerationConfig(), 64))
