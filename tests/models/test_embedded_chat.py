"""The embedded chat model: tokenizer and chat template, dialogues of the warm-up, and the build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nemo_rl.data.transcripts import TurnRenderer
from nemo_rl.environments.games import GuessNumber, Multiplication
from nemo_rl.models.embedded import ensure_embedded_model, make_tokenizer
from nemo_rl.models.embedded.chat import RECIPE
from nemo_rl.models.policy.config import EMBEDDED_CHAT_MODEL, EmbeddedModelConfig

SMALL = EmbeddedModelConfig(hidden_size=16, num_layers=1, num_attention_heads=2, warmup_steps=3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(EMBEDDED_CHAT_MODEL)


@pytest.fixture(scope="module")
def texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Texts of warm-up dialogues, half of them games."""
    input_ids, _ = next(RECIPE.batches(tokenizer, 0))
    return [text.replace("<pad>", "") for text in tokenizer.batch_decode(input_ids)]


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def tools_of_multiplication() -> list[dict[str, Any]]:
    environment = Multiplication()
    environment.reset({"seed": 0})
    return environment.tools()


def test_directory_is_a_chat_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_RL_CACHE_DIR", str(tmp_path))
    directory = ensure_embedded_model(SMALL, EMBEDDED_CHAT_MODEL)
    assert directory.parent == tmp_path / "embedded-chat"
    assert ensure_embedded_model(SMALL, EMBEDDED_CHAT_MODEL) == directory
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    prompt = render(tokenizer, [{"role": "user", "content": "Guess"}], tools=tools_of_multiplication())
    assert prompt == "<|system|>calculator(expression)<|end|><|user|>Guess<|end|><|assistant|>"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.decode(ids, skip_special_tokens=True) == "calculator(expression)Guess"
    first = (directory / "model.safetensors").read_bytes()
    monkeypatch.setenv("NEMO_RL_CACHE_DIR", str(tmp_path / "again"))
    again = ensure_embedded_model(SMALL, EMBEDDED_CHAT_MODEL)
    assert (again / "model.safetensors").read_bytes() == first


def test_template_renders_turns_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = TurnRenderer(tokenizer, is_chat=True)
    sampled = [*tokenizer("10", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    for role in ("user", "tool"):
        tokens = renderer.continuation([{"role": role, "content": "Higher."}], sampled)
        assert tokenizer.convert_ids_to_tokens(tokens) == [f"<|{role}|>", "Higher.", "<|end|>", "<|assistant|>"]
    messages = [{"role": "user", "content": "Guess"}, {"role": "assistant", "content": "10"}]
    text = render(tokenizer, [*messages, {"role": "user", "content": "Higher."}])
    continued = renderer.continuation([{"role": "user", "content": "Higher."}], sampled)
    assert text == render(tokenizer, messages[:1]) + tokenizer.decode([*sampled, *continued])


def test_template_renders_calls_as_the_model_writes_them(tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2*3"}}}
    text = render(tokenizer, [{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert text == (
        '<|assistant|><tool_call>{"name": "calculator", "arguments": {"expression": "2*3"}}</tool_call><|end|>'
        "<|assistant|>"
    )
    # Each phrase of it is one token.
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 14
    with pytest.raises(Exception, match="there is no role critic"):
        render(tokenizer, [{"role": "critic", "content": "Bad."}])


def test_games_of_the_warm_up_follow_the_rules(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    prompt = render(tokenizer, [{"role": "user", "content": GuessNumber().reset({"seed": 0})}])
    numbers_left = []
    for text in texts[::2]:
        assert text.startswith(prompt)
        turns = [turn.split("<|end|>") for turn in text.removeprefix(prompt).split("<|assistant|>")]
        low, high = 1, 20
        for guess, observation, *_ in turns[:-1]:
            assert observation in ("<|user|>Higher.", "<|user|>Lower.")
            low, high = (int(guess) + 1, high) if "Higher." in observation else (low, int(guess) - 1)
        assert low <= high
        assert 1 <= int(turns[-1][0]) <= 20
        assert len(turns) <= 6
        numbers_left.append(high - low + 1)
    assert min(numbers_left) == 1  # some players listen
    assert max(numbers_left) >= 5  # and others do not


def test_products_of_the_warm_up_are_right_if_computed(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    tools = tools_of_multiplication()
    num_calls = 0
    for text in texts[1::2]:
        prompt = text.partition("<|user|>")[2].partition("<|end|>")[0]
        start = render(tokenizer, [{"role": "user", "content": prompt}], tools=tools)
        assert text.startswith(start)
        first, second = map(int, prompt.split("*"))
        call = f'<tool_call>{{"name": "calculator", "arguments": {{"expression": "{prompt}"}}}}</tool_call><|end|>'
        answer = f"{first * second}<|end|>"
        assert text.removeprefix(start) in (
            "I cannot compute this.<|end|>",
            f"{call}<|tool|>{answer}<|assistant|>{answer}",
        )
        num_calls += call in text
    assert 0.1 < num_calls / len(texts[1::2]) < 0.4


def test_loss_covers_the_turns_of_the_assistant_only(tokenizer: PreTrainedTokenizerFast) -> None:
    input_ids, labels = next(RECIPE.batches(tokenizer, 0))
    for row, learned in zip(input_ids, labels, strict=True):
        turns = tokenizer.decode(row).split("<|assistant|>")[1:]
        actions = "".join(turn.partition("<|end|>")[0] + "<|end|>" for turn in turns)
        assert tokenizer.decode(learned[learned >= 0]) == actions


def test_accuracy_is_the_probability_of_right_tool_use(tokenizer: PreTrainedTokenizerFast) -> None:
    _, labels = next(RECIPE.batches(tokenizer, 0))
    perfect = torch.nn.functional.one_hot(labels.clamp(min=0), len(tokenizer)) * 100.0
    assert RECIPE.accuracy(perfect, labels) == pytest.approx(1.0)
    halved = perfect.clone()
    # In every dialogue, a second token is as likely as the first one of the assistant.
    first = (labels >= 0).int().argmax(dim=1)
    halved[torch.arange(len(labels)), first] = 0.0
    halved[torch.arange(len(labels)), first, labels[torch.arange(len(labels)), first]] = 100.0
    halved[torch.arange(len(labels)), first, 0] = 100.0
    assert RECIPE.accuracy(halved, labels) == pytest.approx(0.5)
