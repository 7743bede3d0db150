"""Records of preference pairs, the embedded generator, and batches of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nemo_rl.data import dialogues
from nemo_rl.data.config import PreferenceDataConfig
from nemo_rl.data.conversation_encoder import ConversationEncoder
from nemo_rl.data.conversations import Conversation
from nemo_rl.data.preference_batches import TokenizedPairs, collate_pairs
from nemo_rl.data.preferences import PreferencePair, load_preferences
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.models.embedded import make_tokenizer

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
CHAT = PreferencePair(Conversation([USER], [GOOD]), Conversation([USER], [BAD]))
RECORDS = [
    (
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        PreferencePair(Conversation("2+2?", "4"), Conversation("2+2?", "5")),
    ),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, CHAT),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
    (
        {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD], "margin": 2},
        PreferencePair(Conversation([USER, BAD, USER], [GOOD]), Conversation([USER, BAD, USER], [BAD]), 2.0),
    ),
]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def opened(path: Path, **options: Any) -> Any:
    return load_preferences(PreferenceDataConfig(train={"path": str(path), **options}))[0]


@pytest.mark.parametrize(("record", "expected"), RECORDS)
def test_record_becomes_a_pair(tmp_path: Path, record: dict, expected: PreferencePair) -> None:
    assert list(opened(write(tmp_path / "a.jsonl", [record]))) == [expected]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    assert list(opened(tmp_path / "a.parquet")) == [expected]


def test_prompt_column_can_be_ignored(tmp_path: Path) -> None:
    record = {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    path = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(DataError, match="'prompt' and 'chosen' must both be text or both be lists"):
        opened(path)[0]
    assert list(opened(path, prompt_key=None)) == [CHAT]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosn": "b", "rejected": "c"}, r"a.jsonl:1: no key 'chosen' .*did you mean 'chosn'\?"),
        ({"promt": "a", "chosen": "b", "rejected": "c"}, r"no key 'prompt' .* text need.*'promt'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal, so neither is better"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "'chosen' and 'rejected' are equal"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "'chosen' is empty"),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": " "}]},
            "the answer in 'rejected' is empty",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "'chosen' continues the other conversation, whose answer"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "have no prompt in common: their first messages differ"),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, {**USER, "content": "?"}, GOOD]},
            "answer different prompts: they differ first in message 3, and its role is user",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "'margin' must be a number, got str 'x'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [1]}, "'tools' must be a list of JSON schemas"),
        ({"prompt": "a", "chosen": "b", "rejected": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_invalid_record_is_named(tmp_path: Path, record: dict, message: str) -> None:
    data = opened(write(tmp_path / "a.jsonl", [record]))
    with pytest.raises(DataError, match=f"a.jsonl:1: .*{message.removeprefix('a.jsonl:1: ')}"):
        data[0]


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.train.kind: unknown kind 'dialogs'; did you mean 'dialogues'"):
        load_preferences(PreferenceDataConfig(train={"kind": "dialogs"}))


def test_generated_pairs_prefer_halving_and_the_calculator() -> None:
    train, validation = load_preferences(PreferenceDataConfig(train={"max_num_records": 64}))
    assert validation is not None
    assert (len(train), len(validation)) == (64, 256)
    for index, pair in enumerate(train):
        [good], [bad] = pair.chosen.completion, pair.rejected.completion
        assert pair.chosen.prompt == pair.rejected.prompt
        if index % 2:
            assert pair.chosen.tools == pair.rejected.tools == [dialogues.CALCULATOR_SCHEMA]
            assert (good["content"], bad["content"]) == ("", dialogues.REFUSAL)
        else:
            *_, last, feedback = pair.chosen.prompt
            assert bad["content"] == last["content"]
            assert (int(good["content"]) > int(bad["content"])) == (feedback["content"] == dialogues.HIGHER)


def tokenize(path: Path, max_length: int = 64, overlong: str = "error") -> TokenizedPairs:
    encoder = ConversationEncoder(make_tokenizer("embedded-chat"), PreferenceDataConfig())
    return TokenizedPairs(opened(path), encoder, max_length, overlong)


def test_only_the_answers_are_in_the_loss(tmp_path: Path) -> None:
    record = {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD, USER, GOOD]}
    [pair] = tokenize(write(tmp_path / "a.jsonl", [record]))
    tokenizer = make_tokenizer("embedded-chat")
    texts = [tokenizer.decode(row.input_ids[row.in_loss].tolist()) for row in (pair.chosen, pair.rejected)]
    assert texts == ["4<|end|>", "5<|end|>4<|end|>"]


def test_batch_has_two_rows_per_pair(tmp_path: Path) -> None:
    records = [{"prompt": "1", "chosen": "2" * (i + 1), "rejected": "3", "margin": i} for i in range(3)]
    pairs = tokenize(write(tmp_path / "a.jsonl", records))
    assert pairs.counts()["pairs"] == len(pairs) == 3
    batch = collate_pairs(pairs[:3], 0, 2)
    assert batch["sample_mask"].tolist() == [1.0] * 6 + [0.0] * 2
    assert batch["margin"].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert batch["position"].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert batch["token_mask"].sum(1).tolist() == [2, 2, 3, 2, 4, 2, 2, 2]
    tokenizer = make_tokenizer("embedded-chat")
    assert [tokenizer.decode(row[:n]) for row, n in zip(batch["input_ids"][2:4], batch["input_lengths"][2:4])] == [
        "<|user|>1<|end|><|assistant|>22<|end|>",
        "<|user|>1<|end|><|assistant|>3<|end|>",
    ]


def test_overlong_pairs(tmp_path: Path) -> None:
    # 6 tokens besides the answer. The second pair differs only behind the limit.
    answers = [("1", "2" * 9), ("3333331", "3333332"), ("1", "2")]
    path = write(tmp_path / "a.jsonl", [{"prompt": "1", "chosen": a, "rejected": b} for a, b in answers])
    with pytest.raises(DataError, match="a.jsonl:1: the conversation has 14 tokens, more than"):
        tokenize(path, 8)
    assert tokenize(path, 8, "drop").counts() == {
        "pairs": 1,
        "dropped": 2,
        "truncated": 0,
        "tokens": 12,
        "loss_tokens": 4,
    }
    truncated = tokenize(path, 8, "truncate")
    assert (len(truncated), truncated.num_dropped, truncated.num_truncated) == (2, 1, 1)
    assert [pair.position for pair in truncated] == [0, 1]


def test_answers_with_equal_tokens_are_refused(tmp_path: Path) -> None:
    # The embedded tokenizer has one token for all characters that it does not know.
    path = write(tmp_path / "a.jsonl", [{"prompt": "1", "chosen": "\u00e4", "rejected": "\u00f6"}])
    with pytest.raises(DataError, match="a.jsonl:1: both answers have the same tokens"):
        tokenize(path)


def test_digest_changes_with_the_margin(tmp_path: Path) -> None:
    record = {"prompt": "1", "chosen": "2", "rejected": "3"}
    digests = {tokenize(write(tmp_path / "a.jsonl", [{**record, "margin": m}])).digest for m in (0, 1)}
    assert len(digests) == 2
