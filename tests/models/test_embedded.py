"""Tests the embedded model: tokenizer, determinism, one build for any number of callers, no incomplete model."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_rl.data.arithmetic import ArithmeticDataset
from nemo_rl.models import embedded
from nemo_rl.models.embedded import ensure_embedded_model, make_model, make_tokenizer
from nemo_rl.models.embedded.arithmetic import RECIPE
from nemo_rl.models.embedded.recipe import warm_up
from nemo_rl.models.policy.config import EmbeddedModelConfig

SMALL = EmbeddedModelConfig(hidden_size=16, num_layers=1, num_attention_heads=2, warmup_steps=3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEMO_RL_CACHE_DIR", str(tmp_path))
    return tmp_path / "embedded"


def test_directory_is_a_hugging_face_model(cache: Path) -> None:
    directory = ensure_embedded_model(SMALL)
    assert directory.parent == cache
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert model.config.model_type == "llama"
    assert (directory / "model.safetensors").is_file()
    text = "37+48=85 {x}\n~A"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer("\u00e9")["input_ids"] == [tokenizer.unk_token_id]
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(special) == 4
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_configuration_decides_every_bit(cache: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = (ensure_embedded_model(SMALL) / "model.safetensors").read_bytes()
    assert torch.equal(torch.get_rng_state(), before)
    for path in cache.iterdir():
        path.rename(cache.parent / f"first-{path.name}")
    torch.manual_seed(2)
    again = ensure_embedded_model(SMALL)
    assert (again / "model.safetensors").read_bytes() == first
    other = ensure_embedded_model(SMALL.model_copy(update={"seed": 1}))
    assert other != again
    assert (other / "model.safetensors").read_bytes() != first


def _ensure(results) -> None:
    builds = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            builds.append(record.getMessage().startswith("built the embedded model"))

    embedded.logger.addHandler(Handler())
    embedded.logger.setLevel(logging.INFO)
    results.put((str(ensure_embedded_model(SMALL)), sum(builds)))


@pytest.mark.slow  # starts many processes that import torch
def test_many_processes_build_it_once(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_ensure, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(30)
    assert len({directory for directory, _ in answers}) == 1
    assert sum(builds for _, builds in answers) == 1


def _build_forever() -> None:
    ensure_embedded_model(SMALL.model_copy(update={"warmup_steps": 10**9, "warmup_accuracy": 1.0, "hidden_size": 8}))


@pytest.mark.slow  # starts processes that import torch
def test_killed_builder_leaves_no_model(cache: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_build_forever)
    process.start()
    try:
        deadline = time.monotonic() + 600
        while not list(cache.glob(".*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(cache.glob(".*"))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
    assert [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")] == []
    assert ensure_embedded_model(SMALL).is_dir()


def test_warm_up_ends_at_the_requested_accuracy() -> None:
    """The requested accuracy is low, so it is reached early."""
    config = EmbeddedModelConfig(hidden_size=64, num_layers=2, warmup_accuracy=0.004, warmup_steps=300)
    tokenizer = make_tokenizer()
    model = make_model(config, tokenizer)
    steps, accuracy = warm_up(model, tokenizer, config, RECIPE)
    assert 0 < steps < 300
    assert 0.004 <= accuracy < 0.05
    problem = ArithmeticDataset("train", 1).problem(0)
    ids = torch.tensor([tokenizer(problem.prompt)["input_ids"]])
    output = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)[0, ids.shape[1] :]
    completion = tokenizer.decode(output)
    assert completion.endswith("<eos>")
    assert completion.removesuffix("<eos>").isdigit()
