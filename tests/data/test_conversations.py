"""Records of conversations, and the embedded generator."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemo_rl.data import dialogues
from nemo_rl.data.config import ConversationsConfig, SFTDataConfig
from nemo_rl.data.conversations import Conversation, load_conversations
from nemo_rl.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "string"}}}}}
RECORDS = [
    ({"messages": CHAT}, Conversation([], CHAT)),
    ({"messages": CHAT, "tools": [TOOL]}, Conversation([], CHAT, [TOOL])),
    ({"messages": CHAT, "tools": json.dumps([TOOL])}, Conversation([], CHAT, [TOOL])),
    ({"prompt": "2+2?", "completion": "4"}, Conversation("2+2?", "4")),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Conversation(CHAT[:1], CHAT[1:])),
]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def opened(path: Path, **options):
    return load_conversations(SFTDataConfig(train={"path": str(path), **options}))[0]


@pytest.mark.parametrize(("record", "expected"), RECORDS)
def test_record_becomes_a_conversation(tmp_path: Path, record: dict, expected: Conversation) -> None:
    data = opened(write(tmp_path / "a.jsonl", [record]))
    assert list(data) == [expected]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    assert list(opened(tmp_path / "a.parquet")) == [expected]


def test_keys_can_have_other_names(tmp_path: Path) -> None:
    data = opened(write(tmp_path / "a.jsonl", [{"chat": CHAT}]), messages_key="chat")
    assert data[0] == Conversation([], CHAT)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"mesages": CHAT}, r"a.jsonl:1: no key 'messages' \(data.\*.messages_key\); did you mean 'mesages'\?"),
        ({"prompt": "a", "completions": "b"}, "no key 'completion' .*completion_key.*'completions'"),
        ({"prompt": "a", "completion": CHAT}, "must both be text or both be lists of chat messages, got str and list"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
        ({"messages": []}, r"'messages' must be a list of chat messages, got list \[\]"),
        ({"messages": [{"role": "user"}]}, "must have the keys role and content"),
        ({"messages": CHAT, "tools": "{"}, "'tools' is no JSON"),
        ({"messages": CHAT, "tools": [1]}, "'tools' must be a list of JSON schemas"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_invalid_record_is_named(tmp_path: Path, record: dict, message: str) -> None:
    data = opened(write(tmp_path / "a.jsonl", [record]))
    with pytest.raises(DataError, match=message):
        data[0]


def test_missing_and_empty_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="contains no records"):
        opened(write(tmp_path / "a.jsonl", []))
    with pytest.raises(ConfigError, match="data.train.kind: unknown kind 'dialogs'; did you mean 'dialogues'"):
        load_conversations(SFTDataConfig(train={"kind": "dialogs"}))


def test_splits_of_the_generator_are_disjoint_games_and_products() -> None:
    train, validation = load_conversations(SFTDataConfig(train={"max_num_records": 64}))
    assert validation is not None
    assert (len(train), len(validation)) == (64, 256)
    products = [{data[i].completion[0]["content"] for i in range(1, len(data), 2)} for data in (train, validation)]
    # The seeds are disjoint. A few products are drawn in both by chance: there are 40,000 pairs of factors.
    assert len(products[0] & products[1]) <= 3
    assert train[1].tools == [dialogues.CALCULATOR_SCHEMA]


@pytest.mark.parametrize("seed", range(40))
def test_game_is_won_in_time(seed: int) -> None:
    game = dialogues.halving_game(seed)
    guesses = [int(message["content"]) for message in game if message["role"] == "assistant"]
    assert guesses[-1] == dialogues.secret_number(seed, dialogues.HIGHEST)
    assert len(guesses) <= dialogues.num_guesses(dialogues.HIGHEST)


def test_data_set_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    data, validation = load_conversations(SFTDataConfig(train={"kind": "test_supervised:Chats", "max_num_records": 3}))
    assert [conversation.completion for conversation in data] == ["2", "22", "222"]
    assert validation is None
    with pytest.raises(ConfigError, match="is not a subclass of nemo_rl.data.conversations.ConversationDataset"):
        load_conversations(SFTDataConfig(train={"kind": "nemo_rl.data.problem:Problem"}))


def test_limit_of_records(tmp_path: Path) -> None:
    data = opened(write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 5), max_num_records=2)
    assert len(data) == 2
    assert ConversationsConfig().max_num_records is None
