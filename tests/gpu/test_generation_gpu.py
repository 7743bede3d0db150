"""Tests generation on a GPU: the same completions and log-probabilities as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_generation import CONFIGS, TinyModel
from transformers import AutoModelForCausalLM

from nemo_rl.models.embedded import make_tokenizer
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.weights.sender import publish

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TEXTS = ("What is 1+1? ", "a", "37+48=", "What is 1+1? ")


def _tiny(name: str, directory: Path) -> TinyModel:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](len(tokenizer))).eval()
    model.config.save_pretrained(directory)
    return TinyModel(directory, model, tokenizer)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_gpu_matches_cpu(tmp_path: Path, name: str) -> None:
    model = _tiny(name, tmp_path)
    config = GenerationConfig(max_new_tokens=20)
    on_gpu = TorchGenerator(GeneratorSpec(str(tmp_path), config, max_sequence_length=64, use_gpu=True))
    update = publish(model.model.named_parameters(), version=1, dtype="float32", transport="local")
    assert on_gpu.update_weights(update) == update.digest
    assert all(tensor.device.type == "cuda" for _, tensor in on_gpu.decoder.named_tensors())
    request = model.request(*TEXTS, seed=1, num_generations=4)
    expected = model.generator(max_new_tokens=20).generate(request)
    result = on_gpu.generate(request)
    # A draw at the boundary between two tokens may round to either side.
    same = [a == b for a, b in zip(result.texts, expected.texts)]
    assert sum(same) >= len(same) - 1
    rows = torch.tensor(same)
    width = min(result.logprobs.shape[1], expected.logprobs.shape[1])
    assert torch.allclose(result.logprobs[rows, :width], expected.logprobs[rows, :width], atol=1e-3)


def test_generation_in_bfloat16(tmp_path: Path) -> None:
    model = _tiny("llama", tmp_path)
    config = GenerationConfig(max_new_tokens=20, precision="bfloat16", stop_strings=["7"])
    generator = TorchGenerator(GeneratorSpec(str(tmp_path), config, max_sequence_length=64, use_gpu=True))
    generator.update_weights(publish(model.model.named_parameters(), version=1, dtype="bfloat16", transport="local"))
    result = generator.generate(model.request(*TEXTS, seed=1, num_generations=16))
    assert torch.isfinite(result.logprobs).all()
    assert all("7" not in text[:-1] for text in result.texts)
