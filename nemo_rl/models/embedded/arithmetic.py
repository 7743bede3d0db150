"""The embedded model that learns sums.

Its warm-up teaches the format, which is the bare answer and then end-of-sequence, and part of the task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemo_rl.data.arithmetic import ArithmeticDataset, num_distinct
from nemo_rl.models.embedded.recipe import IGNORED, Recipe, character_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_EOS = "<eos>"
_LEVELS = (1,)
_BATCH = 256


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per character."""
    return character_tokenizer(_EOS)


def supervised_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of train problems with their answers forever, drawn with replacement.

    Yields:
        input_ids [B, T] int64, padded on the right, and labels [B, T] int64: the answer's tokens and end-of-sequence,
        -100 elsewhere.
    """
    import numpy as np
    import torch

    vocabulary = tokenizer.get_vocab()
    dataset = ArithmeticDataset("train", num_distinct("train", _LEVELS), _LEVELS)
    rows = []
    for index in range(len(dataset)):
        problem = dataset.problem(index)
        assert isinstance(problem.prompt, str)
        prompt, answer = ([vocabulary[character] for character in text] for text in (problem.prompt, problem.answer))
        rows.append((prompt, [*answer, tokenizer.eos_token_id]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for index, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[index, :end] = torch.tensor(prompt + answer)
        labels[index, len(prompt) : end] = torch.tensor(answer)
    draws = np.random.Generator(np.random.Philox(seed))
    while True:
        batch = torch.from_numpy(draws.integers(len(rows), size=_BATCH))
        yield input_ids[batch], labels[batch]


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of problems for which the likeliest token is right everywhere, as in greedy decoding."""
    correct = (logits.argmax(-1) == labels) | (labels == IGNORED)
    return float(correct.all(dim=1).float().mean())


RECIPE = Recipe(1, make_tokenizer, supervised_batches, accuracy)
