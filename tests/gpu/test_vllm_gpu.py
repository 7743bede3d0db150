"""Tests vLLM's engine on a GPU, in this process, against transformers. Needs the VLLM venv's packages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_generation import CONFIGS, TinyModel, reference_logprobs
from transformers import AutoModelForCausalLM

from nemo_rl.models.embedded import make_tokenizer
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.vllm.environment import export_vllm_variables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TEXTS = ("What is 1+1? ", "a", "37+48=", "What is 1+1? ")
# GPU attention kernels need heads of at least 64.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    directory = tmp_path_factory.mktemp("qwen2")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = CONFIGS["qwen2"](len(tokenizer))
    for name, value in SIZES.items():
        setattr(config, name, value)
    config.initializer_range = 0.1
    tiny = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    tiny.config.save_pretrained(directory)
    return TinyModel(directory, tiny, tokenizer)


@pytest.fixture(scope="module")
def generator(model: TinyModel) -> Iterator:
    pytest.importorskip("vllm")
    export_vllm_variables()
    from nemo_rl.models.generation.vllm.generator import VllmGenerator

    options = {"gpu_memory_utilization": 0.3, "enable_sleep_mode": True}
    config = GenerationConfig(backend="vllm", options=options, max_new_tokens=20, stop_strings=["7"])
    spec = GeneratorSpec(str(model.directory), config, 64, default_precision="bfloat16", use_gpu=True)
    generator = VllmGenerator(spec)
    yield generator
    generator.shutdown()


def _memory_in_use() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_logprobs_are_close_to_transformers(generator, model: TinyModel) -> None:
    update = model.publish(version=1, dtype="bfloat16")
    assert generator.update_weights(update) == update.digest
    result = generator.generate(model.request(*TEXTS, seed=1, num_generations=16))
    inside = result.logprobs != 0
    difference = (result.logprobs - reference_logprobs(model, result).float())[inside].abs()
    assert difference.mean() < 0.05
    assert torch.equal(result.logprobs, result.sampling_logprobs)
    assert all("7" not in text[:-1] for text in result.texts)


def test_same_seed_gives_same_completions(generator, model: TinyModel) -> None:
    generator.update_weights(model.publish(version=1, dtype="bfloat16"))
    first, second = (generator.generate(model.request(*TEXTS, seed=3, num_generations=4)) for _ in range(2))
    assert first.texts == second.texts


def test_weights_update_while_the_kv_cache_sleeps(generator, model: TinyModel) -> None:
    """As in a step whose policy shares the GPU."""
    generator.update_weights(model.publish(version=1, dtype="bfloat16"))
    expected = generator.generate(model.request(*TEXTS, seed=3))
    awake = _memory_in_use()
    generator.sleep(1)
    generator.wake(["weights"])
    update = model.publish(version=2, dtype="bfloat16")
    assert generator.update_weights(update) == update.digest
    assert _memory_in_use() < awake
    generator.wake(["kv_cache"])
    result = generator.generate(model.request(*TEXTS, seed=3))
    assert result.texts == expected.texts
    assert result.weights_version == 2


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_releases_memory_and_wake_restores_it(generator, model: TinyModel, level: int) -> None:
    update = model.publish(version=1, dtype="bfloat16")
    generator.update_weights(update)
    expected = generator.generate(model.request(*TEXTS, seed=3))
    awake = _memory_in_use()
    generator.sleep(level)
    assert _memory_in_use() < awake
    generator.wake()
    if level == 2:
        assert generator.version is None
        assert generator.update_weights(update) == update.digest
    assert generator.generate(model.request(*TEXTS, seed=3)).texts == expected.texts
