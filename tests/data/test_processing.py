import json
from datetime import datetime

import numpy as np
import pytest

from nemo_rl.data.config import DataConfig
from nemo_rl.data.datasets import load_datasets
from nemo_rl.data.processing import TokenizedProblems
from nemo_rl.errors import ConfigError, DataError


@pytest.fixture
def tokenize(tmp_path, tokenizer):
    """Return a function: prompts -> tokenized problems."""

    def run(prompts, tokenizer=tokenizer, **data):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps({"problem": p, "answer": f"{i}"}) + "\n" for i, p in enumerate(prompts)))
        config = DataConfig(train={"path": str(path)}, **data)
        return TokenizedProblems(load_datasets(config)[0], tokenizer, config)

    return run


def ids_of(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(character) for character in text]


def test_plain_text(tokenize, tokenizer):
    problems = tokenize(["1+1=", "12+3="])
    assert len(problems) == 2
    assert problems[1].text == "12+3="
    assert problems[1].input_ids.tolist() == [tokenizer.bos_token_id, *ids_of(tokenizer, "12+3=")]
    assert problems[1].input_ids.dtype == np.int32
    assert problems[-1].problem.answer == "1"
    assert [problem.problem.index for problem in problems[:2]] == [0, 1]
    with pytest.raises(IndexError):
        problems[2]


def test_prompt_template_from_text_and_file(tokenize, tmp_path):
    assert tokenize(["{x}"], prompt_template="Solve {problem} in \\boxed{}.")[0].text == "Solve {x} in \\boxed{}."
    file = tmp_path / "template.txt"
    file.write_text("Q: {problem}\nA:")
    assert tokenize(["1+1"], prompt_template=str(file))[0].text == "Q: 1+1\nA:"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("Solve {question}", r"does not contain \{problem\} and is not a file"),
        ("{tmp}/no.txt", "is not a file"),
        ("{tmp}/t", r"t does not contain \{problem\}"),
    ],
)
def test_bad_templates(tokenize, tmp_path, template, match):
    (tmp_path / "t").write_text("no placeholder")
    with pytest.raises(ConfigError, match=match):
        tokenize(["1+1"], prompt_template=template.replace("{tmp}", str(tmp_path)))


def test_chat_template(tokenize, chat_tokenizer):
    problems = tokenize(["1+1"], chat_tokenizer, system_prompt="Be brief.", prompt_template="{problem}?")
    assert problems[0].text == "<s>Be brief.<u>1+1?<a>"
    # The template adds the special tokens itself, so there is no second beginning-of-sequence token.
    assert problems[0].input_ids.tolist() == ids_of(chat_tokenizer, "<s>Be brief.<u>1+1?<a>")


def test_chat_messages(tokenize, chat_tokenizer):
    chat = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "+1"},
    ]
    assert tokenize([chat], chat_tokenizer)[0].text == "<u>1+1<a>2<u>+1<a>"
    with_system = [{"role": "system", "content": "mine"}, *chat[:1]]
    assert tokenize([with_system], chat_tokenizer, system_prompt="default")[0].text == "<s>mine<u>1+1<a>"


def test_chat_needs_a_chat_model(tokenize, chat_tokenizer):
    chat = [{"role": "user", "content": "1+1"}]
    with pytest.raises(DataError, match=r"data.jsonl:2: the prompt is a list of chat messages"):
        tokenize(["1", chat])
    with pytest.raises(DataError, match=r"apply_chat_template is false"):
        tokenize([chat], chat_tokenizer, apply_chat_template=False)
    with pytest.raises(ConfigError, match="data.system_prompt needs a chat model"):
        tokenize(["1"], system_prompt="Be brief.")
    assert tokenize(["1"], chat_tokenizer, apply_chat_template=False)[0].text == "1"


def test_chat_template_that_rejects_a_prompt(tokenize, chat_tokenizer):
    with pytest.raises(DataError, match=r"data.jsonl:1: .*chat template rejects.*unknown role tool"):
        tokenize([[{"role": "tool", "content": "x"}]], chat_tokenizer)


def with_template(chat_tokenizer, template):
    import copy

    changed = copy.deepcopy(chat_tokenizer)
    changed.chat_template = template
    return changed


DATED = [
    "{{ strftime_now('%d %b %Y') }}",
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}",
    "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ today() }}",
    "{% set parts = namespace(d='') %}{% for m in messages %}{% set parts.d = strftime_now('%d %b %Y') %}{% endfor %}"
    "{{ parts.d }}",
]


@pytest.mark.parametrize("template", DATED)
def test_chat_template_reads_the_time_of_the_run(chat_tokenizer, template):
    from nemo_rl.data.processing import PromptFormatter

    tokenizer = with_template(chat_tokenizer, template)
    formatter = PromptFormatter(tokenizer, DataConfig(), datetime(2026, 11, 28, 23, 59, 59))
    assert formatter.text("1", "row 0") == "28 Nov 2026"
    now = PromptFormatter(tokenizer, DataConfig())
    assert now.text("1", "row 0") == now._now.strftime("%d %b %Y")


def test_every_prompt_of_a_data_set_has_the_same_time(tokenize, chat_tokenizer):
    tokenizer = with_template(chat_tokenizer, "{{ strftime_now('%f') }}")
    problems = tokenize(["1", "2", "3"], tokenizer)
    texts = [problem.text for problem in problems]  # rendered again when they are read
    assert len(set(texts)) == 1
    assert all(problem.input_ids.tolist() == ids_of(tokenizer, texts[0]) for problem in problems)


@pytest.mark.parametrize(
    ("template", "drawn"),
    [
        ("{{ ['a', 'b'] | random }}", "`random`"),
        ("{% set x = messages|random %}{{ x.content }}", "`random`"),
        ("{{ lipsum(n=1) }}", "`lipsum`"),
        ({"default": "{{ messages[0].content }}", "tools": "{{ lipsum() }}"}, "`lipsum`"),
    ],
)
def test_chat_template_that_draws_random_values_is_refused(tokenize, chat_tokenizer, template, drawn):
    with pytest.raises(ConfigError, match=f"chat template uses {drawn}, which returns another text"):
        tokenize(["1"], with_template(chat_tokenizer, template))


def test_words_in_a_chat_template_are_not_filters(tokenize, chat_tokenizer):
    template = "| random | lipsum {# |random #}{{ messages[0].random or '|random' }}{{ messages[0].content }}"
    assert tokenize(["1"], with_template(chat_tokenizer, template))[0].text == "| random | lipsum |random1"


def test_long_prompts_are_an_error_or_dropped(tokenize, caplog):
    prompts = ["1", "12345", "1234", "123456789"]  # each has one more token, the bos token
    with pytest.raises(DataError, match=r"data.jsonl:2: the prompt has 6 tokens, more than data.max_prompt_length=5"):
        tokenize(prompts, max_prompt_length=5)
    problems = tokenize(prompts, max_prompt_length=5, overlong_prompts="drop")
    assert [problem.text for problem in problems] == ["1", "1234"]
    assert [problem.problem.index for problem in problems] == [0, 2]
    assert problems.num_dropped == 2
    assert "2 of 4 prompts are longer than 5 tokens and are dropped (the longest has 10)" in caplog.text
    with pytest.raises(DataError, match="4 of 4 prompts are longer than 1 tokens"):
        tokenize(prompts, max_prompt_length=1, overlong_prompts="drop")
    assert tokenize(["1234"], max_prompt_length=5).num_dropped == 0


def test_prompt_without_tokens(tokenize, chat_tokenizer):
    import copy

    empty = copy.deepcopy(chat_tokenizer)
    empty.chat_template = "{% if false %}x{% endif %}"
    with pytest.raises(DataError, match="data.jsonl:1: the prompt has no tokens"):
        tokenize(["1"], empty)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("$A <eos>", "12"),
        ("^^ $A <eos>", "^12"),
        ("^^ $A <eos> <eos>", "^12"),
        ("^^ $A <pad>", "^12"),
        ("<eos> $A", "$12"),
        ("<eos> $A <eos>", "$12"),  # one token is both, as in GPT-2
        ("$A", "12"),
    ],
)
def test_prompts_do_not_end_in_appended_tokens(tokenize, tokenizer, frame, expected):
    """Expected: `^` is the bos token, `$` is the eos token."""
    special = framed(tokenizer, frame)
    bos, eos = special.bos_token_id, special.eos_token_id
    ids = [{"^": bos, "$": eos}.get(c) or special.convert_tokens_to_ids(c) for c in expected]
    problems = tokenize(["12", "345", "$"], special)
    assert problems[0].input_ids.tolist() == ids
    assert len(problems[1].input_ids) == len(ids) + 1
    assert problems[2].input_ids.tolist()[-1] == special.convert_tokens_to_ids("$")


def test_end_of_sequence_in_the_text_is_kept(tokenize, tokenizer):
    special = framed(tokenizer, "^^ $A <eos>")
    [problem] = tokenize(["1<eos>"], special)
    assert problem.input_ids.tolist() == [special.bos_token_id, *ids_of(special, "1"), special.eos_token_id]


def framed(tokenizer, frame):
    """Return the tokenizer with an eos token and a post-processor that puts texts at `$A` of `frame`."""
    import copy

    from tokenizers import processors

    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"eos_token": "<eos>"})
    tokens = [(token, special.convert_tokens_to_ids(token)) for token in ("^^", "<eos>", "<pad>")]
    special.backend_tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=tokens)
    return special


def test_digest_covers_prompts_answers_and_order(tokenize):
    same, again = tokenize(["12", "3"]), tokenize(["12", "3"])
    assert same.digest == again.digest
    others = [tokenize(["1", "23"]), tokenize(["3", "12"]), tokenize(["12"]), tokenize(["12", "3", "4"])]
    assert len({same.digest, *(other.digest for other in others)}) == 5


def test_more_problems_than_one_tokenizer_batch(tokenize, tokenizer):
    problems = tokenize([f"{i}" for i in range(2500)])
    for i in (0, 1023, 1024, 2499):
        assert problems[i].text == str(i)
        assert problems[i].input_ids.tolist()[1:] == ids_of(tokenizer, str(i))
