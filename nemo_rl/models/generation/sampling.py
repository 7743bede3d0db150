"""Draws the next token: reproducible uniforms per row, and the inverse of the cumulative distribution.

A draw depends on (seed, row, token index) only. Each row of a request has its own stream of a counter-based generator,
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose
key is the seed and whose counter is (token index / 4, row). So a row draws the same uniforms however the batch is split
over workers or reordered. (The *probabilities* may still differ in the last bit between batch sizes, because matrix
products round differently; with the same number of workers every bit repeats.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nemo_rl.models.generation.config import SamplingConfig

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10

Words = npt.NDArray[np.uint64]


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Run ten rounds of Philox4x32 on arrays of 32-bit words (kept in uint64, broadcast against each other)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _32) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def row_uniforms(seed: int, rows: npt.NDArray[np.int64], num_tokens: int) -> torch.Tensor:
    """Return uniform draws in (0, 1).

    Args:
        seed: Any non-negative integer below 2**64.
        rows: [B], positions of the rows in the driver's call.
        num_tokens: T. A larger T appends draws; the first ones stay the same.

    Returns:
        [B, T] float64.
    """
    blocks = np.arange((num_tokens + 3) // 4, dtype=np.uint64)[None, :]
    positions = rows.astype(np.uint64)[:, None]
    zero = np.zeros(1, np.uint64)
    words = philox4x32((blocks, zero, positions & _LOW, positions >> _32), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    stacked = np.stack(np.broadcast_arrays(*words), axis=-1).reshape(len(rows), -1)[:, :num_tokens]
    return torch.from_numpy((stacked.astype(np.float64) + 0.5) * 2.0**-32)


@dataclass(frozen=True)
class Drawn:
    """One drawn token per row, with the two log-probabilities of `GenerationResult`: [B] int64, float32, float32.

    `has_stop` says whether any of the tokens is a stop token; None: not known.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    sampling_logprobs: torch.Tensor
    has_stop: bool | None = None


class Sampler:
    """Draws tokens from logits, with the temperature, top-p and top-k of a `SamplingConfig`.

    Example:
        >>> sampler = Sampler(SamplingConfig(top_k=1), greedy=False)
        >>> drawn = sampler.draw(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.5], dtype=torch.float64))
        >>> drawn.tokens.tolist(), drawn.sampling_logprobs.tolist()
        ([1], [0.0])

    Attributes:
        greedy: take the likeliest token, whatever the configuration says.
        temperature: of the configuration.
    """

    def __init__(self, config: SamplingConfig, *, greedy: bool) -> None:
        self.greedy = greedy
        self.temperature = config.temperature
        self._top_p = config.top_p
        self._top_k = config.top_k

    def draw(self, logits: torch.Tensor, uniforms: torch.Tensor) -> Drawn:
        """Draw from logits [B, V] float32 with uniforms [B] float64 in (0, 1)."""
        if self.truncates(logits.shape[-1]):
            logprobs = _logprobs(logits, self.temperature)
            tokens, sampling = self._draw_truncated(logprobs, uniforms)
            return Drawn(tokens[:, 0], logprobs.gather(1, tokens)[:, 0], sampling[:, 0])
        return Drawn(*draw_tokens(logits, uniforms, self.temperature, self.greedy))

    def truncates(self, vocabulary: int) -> bool:
        """Whether tokens are drawn from a part of the vocabulary only, which `draw_tokens` does not do."""
        return not self.greedy and (self._top_p < 1.0 or (self._top_k is not None and self._top_k < vocabulary))

    def _draw_truncated(self, logprobs: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw after top-k, then top-p within the top k, both after temperature; returns tokens and logprobs [B, 1].

        top-p keeps the smallest set of likeliest tokens whose probability reaches p (Holtzman et al., 2020, "The
        curious case of neural text degeneration"): a token is kept while the tokens before it sum to less than p.
        """
        k = min(self._top_k or logprobs.shape[-1], logprobs.shape[-1])
        if k < logprobs.shape[-1]:
            kept, order = logprobs.topk(k, dim=-1)
        else:
            # Stable, so that equally likely tokens are kept in the same order everywhere.
            kept, order = logprobs.sort(dim=-1, descending=True, stable=True)
        probabilities = kept.softmax(-1)
        if self._top_p < 1.0:
            before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
            probabilities = probabilities.masked_fill(before >= self._top_p, 0.0)
        rank = _invert(probabilities, uniforms)
        chosen = probabilities.gather(1, rank) / probabilities.sum(-1, keepdim=True)
        return order.gather(1, rank), chosen.log()


def draw_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, greedy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw from all tokens, or take the likeliest ones. TorchScript compiles this function.

    Args:
        logits: [B, V] float32.
        uniforms: [B] float64 in (0, 1).
        temperature: for draws.
        greedy: take the likeliest tokens, with their log-probabilities at temperature 1.

    Returns:
        Tokens, log-probabilities, log-probabilities of the draws: the tensors of `Drawn`.
    """
    if greedy:
        tokens = logits.argmax(-1, keepdim=True)
        picked = logits.log_softmax(-1).gather(1, tokens)[:, 0]
        return tokens[:, 0], picked, torch.zeros_like(picked)
    logprobs = _logprobs(logits, temperature)
    tokens = _invert(logprobs.exp(), uniforms)
    picked = logprobs.gather(1, tokens)[:, 0]
    return tokens[:, 0], picked, picked


def _logprobs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def _invert(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return [B, 1]: the first index whose cumulative probability exceeds u * total. It never has probability 0."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    targets = (uniforms * cumulative[:, -1])[:, None]
    # Only NaN probabilities lead beyond the last token; the caller reports them.
    return torch.searchsorted(cumulative, targets, right=True).clamp_(max=probabilities.shape[-1] - 1)
