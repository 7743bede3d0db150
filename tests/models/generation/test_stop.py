"""Tests stop strings in decoded text against a search of the full text after every token."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_rl.errors import ModelError
from nemo_rl.models.generation.stop import StopRules


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: a token is several characters, or a part of one."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    inner.train_from_iterator(["the answer is 42\n\nStop here. STOP! ende \u00e9t\u00e9 \u4f60\u597d"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def _slow_end(tokenizer, tokens: list[int], stop_ids: set[int], strings: list[str]) -> int | None:
    for length in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
        if tokens[length - 1] in stop_ids or any(string in text for string in strings):
            return length
    return None


@pytest.mark.parametrize("strings", [["42"], ["\n\n"], ["is 4", "Stop"], ["\u4f60\u597d"], ["\u00e9"], [" "]])
@pytest.mark.parametrize("step", [1, 4])
def test_stop_string_ends_at_its_last_token(tokenizer, strings: list[str], step: int) -> None:
    rules = StopRules(tokenizer, {1}, strings)
    draws = random.Random(0)
    pieces = ["the answer", " is", " 42", "\n", "\n\nStop", "St", "op", "\u4f60", "\u597d", "\u00e9t\u00e9", " ende"]
    num_stopped = 0
    for _ in range(60):
        text = "".join(draws.choices(pieces, k=12))
        tokens = tokenizer(text)["input_ids"]
        if draws.random() < 0.2:
            tokens.insert(draws.randrange(len(tokens)), 1)
        expected = _slow_end(tokenizer, tokens, {1}, strings)
        end = None
        for start in range(0, len(tokens), step):
            end = rules.first_end(tokens[: start + step], start)
            if end is not None:
                break
        assert end == expected, text
        num_stopped += expected is not None
    assert num_stopped > 10


def test_long_completion_is_searched_by_its_tail(tokenizer) -> None:
    rules = StopRules(tokenizer, set(), ["STOP!"])
    tokens = tokenizer("the answer is 42! " * 200)["input_ids"]
    assert rules.first_end(tokens, 0) is None
    stop = tokenizer("STOP!")["input_ids"]
    assert rules.first_end(tokens + stop, len(tokens)) == len(tokens) + len(stop)


def test_special_token_as_stop_string_is_a_stop_token(tokenizer) -> None:
    rules = StopRules(tokenizer, set(), ["<eos>"])
    assert rules.strings == ()
    assert rules.first_end([5, 1, 6], 0) == 2


def test_empty_stop_string_is_rejected(tokenizer) -> None:
    with pytest.raises(ModelError, match="empty stop string"):
        StopRules(tokenizer, set(), [""])
