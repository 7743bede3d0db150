"""Transcripts of several turns are exactly the sampled tokens, and what the chat template puts between them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.data.transcripts import TurnRenderer
from nemo_rl.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "<|bos|>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# Renders results of tools as messages of the user, several in one, as the templates of Qwen do.
TOOLS = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS_THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
STRIPS_THINKING = CHATML.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
)
NUMBERS_TURNS = CHATML.replace("{{ m.role }}\n", "{{ m.role }} {{ messages | length - loop.index }}\n")
LAST_TURN_ONLY = CHATML.replace("for m in messages", "for m in messages[-1:]")
ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}" + CHATML
OBSERVATION_LAST = CHATML.replace("{{ m.content }}", "{% if loop.last %}Now: {% endif %}{{ m.content }}")

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|start|>", "<|end|>"]


def make_tokenizer(template: str | None) -> Any:
    """Return a tokenizer with one token per character, and the special tokens of the templates."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *map(chr, range(32, 127))]
    model = models.WordLevel({token: index for index, token in enumerate(["<unk>", *characters])}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=template)


TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "tools": TOOLS, "opens thinking": OPENS_THINKING}
TOKENIZERS = {name: make_tokenizer(template) for name, template in TEMPLATES.items()}
texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


@pytest.mark.parametrize("name", ["chatml", "headers", "tools"])
@given(turns=st.lists(st.tuples(texts, st.sampled_from(["user", "tool"]), st.lists(texts, min_size=1)), max_size=4))
def test_transcript_is_what_was_sampled_and_what_the_template_renders(name: str, turns: Any) -> None:
    tokenizer = TOKENIZERS[name]
    renderer = TurnRenderer(tokenizer, is_chat=True)
    [end] = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    conversation = [{"role": "user", "content": "Begin"}]
    start = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    transcript = tokenizer.encode(start, add_special_tokens=False)
    sampled_at: list[tuple[int, list[int]]] = []
    for action, role, observations in turns:
        sampled = [*tokenizer.encode(action, add_special_tokens=False), end]
        sampled_at.append((len(transcript), sampled))
        messages = [{"role": role, "content": text} for text in observations]
        transcript += sampled + renderer.continuation(messages, sampled)
        conversation += [{"role": "assistant", "content": action}, *messages]
    assert all(transcript[position : position + len(tokens)] == tokens for position, tokens in sampled_at)
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert transcript == tokenizer.encode(rendered, add_special_tokens=False)


def test_sampled_tokens_are_not_encoded_again() -> None:
    """Tokens that no encoding returns stay, as two characters that an encoding would merge, or a special token."""
    tokenizer = TOKENIZERS["chatml"]
    unknown, start = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")
    tail = TurnRenderer(tokenizer, is_chat=True).continuation([{"role": "user", "content": "?"}], [unknown, start])
    assert tokenizer.decode(tail) == "<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"


def test_end_of_turn_is_added_if_it_was_not_sampled() -> None:
    tokenizer = TOKENIZERS["chatml"]
    renderer = TurnRenderer(tokenizer, is_chat=True)
    [end] = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    message = [{"role": "user", "content": "?"}]
    cut_off, complete = renderer.continuation(message, [1]), renderer.continuation(message, [1, end])
    assert cut_off == [end, *complete]
    assert renderer.continuation(message, []) == cut_off


def test_template_that_opens_thinking() -> None:
    renderer = TurnRenderer(TOKENIZERS["opens thinking"], is_chat=True)
    tokens = renderer.continuation([{"role": "user", "content": "?"}], [])
    assert TOKENIZERS["opens thinking"].decode(tokens).endswith("<|im_start|>assistant\n<think>\n")


def test_without_a_template_the_text_is_appended() -> None:
    tokenizer = make_tokenizer(None)
    renderer = TurnRenderer(tokenizer, is_chat=False)
    messages = [{"role": "user", "content": " ab"}, {"role": "user", "content": "c"}]
    assert tokenizer.decode(renderer.continuation(messages, [5])) == " abc"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRIPS_THINKING, "removes the thinking of earlier turns, .* set data.keep_thinking=true"),
        (NUMBERS_TURNS, "renders each action once and the turns before it unchanged"),
        (LAST_TURN_ONLY, "renders each action once"),
        (ONE_TURN, "rejects the observation: one message only"),
        (OBSERVATION_LAST, "renders an observation the same way in every turn"),
    ],
)
def test_template_that_is_refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TurnRenderer(make_tokenizer(template), is_chat=True)


def test_thinking_is_kept_on_request() -> None:
    tokenizer = make_tokenizer(STRIPS_THINKING)
    sampled = tokenizer.encode("<think>\nhm\n</think>\n\n7", add_special_tokens=False)
    tail = TurnRenderer(tokenizer, is_chat=True, keep_thinking=True).continuation(
        [{"role": "user", "content": "?"}], sampled
    )
    assert tokenizer.decode(tail) == "<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"


def test_observation_that_the_template_rejects() -> None:
    template = CHATML.replace(
        "<|im_start|>{{", "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}<|im_start|>{{"
    )
    renderer = TurnRenderer(make_tokenizer(template), is_chat=True)
    with pytest.raises(DataError, match="rejects the observation: no tools"):
        renderer.continuation([{"role": "tool", "content": "4"}], [1])
