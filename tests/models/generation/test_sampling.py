"""Tests the random number generator against published vectors, and the sampler against transformers' warpers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nemo_rl.models.generation.config import SamplingConfig
from nemo_rl.models.generation.sampling import Sampler, philox4x32, row_uniforms

# Known answers of Random123, the authors' implementation (kat_vectors, philox4x32 10).
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_matches_published_vectors(counter, key, expected) -> None:
    words = philox4x32(tuple(np.array([word], np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_uniforms_depend_on_seed_row_and_token_only() -> None:
    uniforms = row_uniforms(5, np.arange(10), 9)
    assert torch.equal(uniforms[3:6], row_uniforms(5, np.arange(3, 6), 9))
    assert torch.equal(uniforms[:, :5], row_uniforms(5, np.arange(10), 5))
    assert len(torch.unique(uniforms)) == uniforms.numel()
    assert not torch.equal(uniforms, row_uniforms(5 + 2**32, np.arange(10), 9))
    assert not torch.equal(uniforms, row_uniforms(6, np.arange(10), 9))


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    draws = row_uniforms(0, np.arange(1000), 100).numpy()
    assert draws.min() > 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, bins=100, range=(0, 1))
    assert abs(counts - 1000).max() < 200  # more than six standard deviations
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.5),
        SamplingConfig(temperature=2.0, top_k=5),
        SamplingConfig(top_p=0.6),
        SamplingConfig(temperature=1.5, top_k=8, top_p=0.7),
        SamplingConfig(top_k=100),
    ],
    ids=str,
)
def test_draws_follow_the_warped_distribution(config: SamplingConfig) -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(1)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
    if config.top_k is not None:
        warpers.append(TopKLogitsWarper(min(config.top_k, 20)))
    if config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).softmax(-1)[0]
    # Evenly spaced uniforms draw each token in proportion to its probability, up to one draw.
    num_draws = 20_000
    uniforms = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    drawn = Sampler(config, greedy=False).draw(logits.expand(num_draws, -1), uniforms)
    frequencies = torch.bincount(drawn.tokens, minlength=20) / num_draws
    assert (frequencies - expected).abs().max() <= 2 / num_draws
    assert torch.allclose(drawn.sampling_logprobs, expected[drawn.tokens].log(), atol=1e-5)
    logprobs = (logits / config.temperature).log_softmax(-1)[0]
    assert torch.allclose(drawn.logprobs, logprobs[drawn.tokens], atol=1e-5)
    if not config.truncates:
        assert torch.equal(drawn.logprobs, drawn.sampling_logprobs)


def test_greedy_draws_have_the_logprobs_of_the_model() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    drawn = Sampler(SamplingConfig(temperature=0.5), greedy=True).draw(logits, torch.tensor([0.5]).double())
    assert drawn.tokens.tolist() == [1]
    assert torch.equal(drawn.logprobs, logits.log_softmax(-1)[:, 1])


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((3, 4), float("-inf"))
    logits[:, 2] = 0.0
    uniforms = torch.tensor([1e-12, 0.5, 1 - 1e-12], dtype=torch.float64)
    assert Sampler(SamplingConfig(), greedy=False).draw(logits, uniforms).tokens.tolist() == [2, 2, 2]
    assert Sampler(SamplingConfig(top_p=0.9), greedy=False).draw(logits, uniforms).tokens.tolist() == [2, 2, 2]
