"""Tests how many threads a torch generation worker computes with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_generation import TinyModel

from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.torch import torch_generation_worker
from nemo_rl.models.generation.torch.torch_generation_worker import TorchGenerationWorker


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def num_threads(tiny: Callable[[str], TinyModel], **config: int) -> int:
    spec = GeneratorSpec(str(tiny("llama").directory), GenerationConfig(**config), 64)
    threads: int = TorchGenerationWorker(spec).attestation()["num_threads"]
    return threads


def test_threads_decode_their_own_rows_of_a_small_model(tiny: Callable[[str], TinyModel]) -> None:
    assert num_threads(tiny) == len(os.sched_getaffinity(0))
    assert torch.get_num_threads() == 1  # of one operation


def test_configured_number_of_threads_is_kept(tiny: Callable[[str], TinyModel]) -> None:
    assert num_threads(tiny, num_threads=3) == 3
    assert torch.get_num_threads() == 1


def test_small_models_of_other_families_are_decoded_by_one_thread(tiny: Callable[[str], TinyModel]) -> None:
    spec = GeneratorSpec(str(tiny("gpt2").directory), GenerationConfig(num_threads=3), 64)
    assert TorchGenerationWorker(spec).attestation()["num_threads"] == 1  # the others would wait for the interpreter


def test_other_models_use_the_share_of_the_cpus(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_generation_worker, "SMALL_MODEL", 100)
    assert num_threads(tiny) == torch.get_num_threads() == len(os.sched_getaffinity(0))
