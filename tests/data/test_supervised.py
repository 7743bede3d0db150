"""Tokens of conversations and which of them are in the loss."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from nemo_rl.data.config import ConversationsConfig, SFTDataConfig
from nemo_rl.data.conversation_encoder import ConversationEncoder, TokenizedConversation
from nemo_rl.data.conversations import Conversation, ConversationDataset, load_conversations
from nemo_rl.data.problem import Role
from nemo_rl.data.supervised import TokenizedConversations, collate_conversations
from nemo_rl.data.tokenized_examples import ExampleLoader
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import CheckpointError, ConfigError, DataError
from nemo_rl.models.embedded import make_tokenizer

END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like some reasoning models: what precedes </think> disappears when the conversation continues.
THINKING = CHATML.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
CHAT = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "It is 6.\n"},
]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with merges over spaces, digits and newlines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", END, "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = ["assistant\nIt is 4.\n\n", "user\nWhat is 2+2?\n", "And 3+3?", "It is 6.\n", "Ärger ✓ 漢字"] * 20
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token="<|pad|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def encode(tokenizer: Any, conversation: Conversation, **options: Any) -> TokenizedConversation:
    [encoded] = ConversationEncoder(tokenizer, SFTDataConfig(**options)).encode([conversation], ["a.jsonl:7"])
    return encoded


def in_loss(tokenizer: Any, encoded: TokenizedConversation) -> str:
    return tokenizer.decode(encoded.input_ids[encoded.in_loss].tolist())


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_turns_of_the_assistant_are_in_the_loss(bpe: Any, template: str) -> None:
    tokenizer = with_template(bpe, template)
    encoded = encode(tokenizer, Conversation([], CHAT))
    assert encoded.input_ids.tolist() == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert in_loss(tokenizer, encoded) == f"It is 4.{END}\nIt is 6.\n{END}\n"
    last = encode(tokenizer, Conversation([], CHAT), loss_on="last_turn")
    assert in_loss(tokenizer, last) == f"It is 6.\n{END}\n"


def test_markers_and_rendering_agree(bpe: Any) -> None:
    draws = random.Random(0)
    words = ["It is 4.", "\n", " ", "漢字", "Ärger ✓", "2+2", "assistant", "."]
    for _ in range(50):
        chat = [
            {"role": role, "content": "".join(draws.choices(words, k=draws.randint(1, 6)))}
            for _ in range(draws.randint(1, 3))
            for role in draws.choice([("user", "assistant"), ("user", "assistant", "assistant")])
        ]
        for mask in ("rendering", "markers"):
            loss_on = draws.choice(["assistant_turns", "last_turn"])
            expected = encode(with_template(bpe, CHATML), Conversation([], chat), loss_on=loss_on)
            marked = encode(with_template(bpe, MARKED), Conversation([], chat), mask=mask, loss_on=loss_on)
            assert marked.input_ids.tolist() == expected.input_ids.tolist()
            assert marked.in_loss.tolist() == expected.in_loss.tolist()


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_prompt_is_not_in_the_loss(bpe: Any, template: str) -> None:
    tokenizer = with_template(bpe, template)
    encoded = encode(tokenizer, Conversation(CHAT[:3], CHAT[3:]))
    assert encoded.input_ids.tolist() == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert in_loss(tokenizer, encoded) == f"It is 6.\n{END}\n"


def test_text_is_rendered_as_a_chat_if_there_is_a_template(bpe: Any) -> None:
    encoded = encode(bpe, Conversation("2+2?", "It is 4."), system_prompt="Add.")
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2?"}]
    expected = [*chat, {"role": "assistant", "content": "It is 4."}]
    assert encoded.input_ids.tolist() == bpe.apply_chat_template(expected, tokenize=True, return_dict=False)
    assert in_loss(bpe, encoded) == f"It is 4.{END}\n"


def test_plain_text_ends_with_end_of_sequence(bpe: Any, tokenizer: Any) -> None:
    for encoded in (
        encode(with_template(bpe, None), Conversation("2+2?", " 漢")),
        encode(bpe, Conversation("2+2?", " 漢"), apply_chat_template=False),
    ):
        assert bpe.decode(encoded.input_ids.tolist()) == f"2+2? 漢{END}"
        assert in_loss(bpe, encoded) == f" 漢{END}"
    # A tokenizer with a bos token and no eos token.
    encoded = encode(tokenizer, Conversation("2+2?", "4"))
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()) == ["^^", "2", "+", "2", "?", "4"]
    assert encoded.in_loss.tolist() == [False] * 5 + [True]


def test_template_that_changes_earlier_turns_is_refused(bpe: Any) -> None:
    tokenizer = with_template(bpe, THINKING)
    chat = copy.deepcopy(CHAT)
    chat[1]["content"] = "Hm.</think>It is 4."
    with pytest.raises(DataError, match=r"a.jsonl:7: .* message 2 \(assistant\) .*data.loss_on=last_turn"):
        encode(tokenizer, Conversation([], chat))
    assert in_loss(tokenizer, encode(tokenizer, Conversation([], chat), loss_on="last_turn")) == f"It is 6.\n{END}\n"


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (CHAT[:1], "there is no turn of the assistant to learn; the roles are: user"),
        (CHAT[1:2], "the conversation begins with the assistant"),
    ],
)
def test_conversations_that_cannot_be_learned_are_named(bpe: Any, chat: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl:7: {message}"):
        encode(bpe, Conversation([], chat))


def test_completion_without_a_turn_is_refused(bpe: Any) -> None:
    with pytest.raises(DataError, match="a.jsonl:7: there is no turn of the assistant to learn"):
        encode(bpe, Conversation(CHAT[:2], CHAT[2:3]))


def test_template_that_rejects_a_conversation_is_reported(bpe: Any) -> None:
    for template in (CHATML, MARKED):
        rejecting = with_template(bpe, "{{ raise_exception('no tools') }}" + template)
        with pytest.raises(
            DataError, match="a.jsonl:7: the tokenizer's chat template rejects the conversation: no tools"
        ):
            encode(rejecting, Conversation([], CHAT))


def test_unsuitable_tokenizers_are_refused(bpe: Any) -> None:
    with pytest.raises(ConfigError, match="data.mask=markers, but the tokenizer's chat template has no"):
        encode(bpe, Conversation([], CHAT), mask="markers")
    with pytest.raises(
        DataError, match="a.jsonl:7: the record has chat messages, but the tokenizer has no chat template"
    ):
        encode(with_template(bpe, None), Conversation([], CHAT))
    with pytest.raises(ConfigError, match="data.system_prompt needs a chat model"):
        encode(with_template(bpe, None), Conversation("a", "b"), system_prompt="x")
    with pytest.raises(ConfigError, match="ByT5Tokenizer is not a fast tokenizer"):
        encode(ByT5Tokenizer(), Conversation("a", "b"))
    with pytest.raises(ConfigError, match="chat template uses `random`"):
        encode(with_template(bpe, "{{ [1, 2] | random }}" + CHATML), Conversation([], CHAT))


def test_markers_around_nothing_are_refused(bpe: Any) -> None:
    nothing = with_template(bpe, CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    with pytest.raises(DataError, match="markers of the tokenizer's chat template enclose no token"):
        encode(nothing, Conversation([], CHAT))


def test_tool_calls_of_the_embedded_model_are_in_the_loss() -> None:
    tokenizer = make_tokenizer("embedded-chat")
    train, _ = load_conversations(SFTDataConfig())
    encoded = encode(tokenizer, train[1])
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "337*86"}}</tool_call><|end|>'
    assert in_loss(tokenizer, encoded) == f"{call}28982<|end|>"


class Chats(ConversationDataset):
    """Conversations with 1 to `count` digits of answer."""

    def __init__(self, count: int) -> None:
        self.count = count

    @classmethod
    def from_config(cls, config: ConversationsConfig, role: Role) -> Chats:
        return cls(config.max_num_records or 6)

    def __len__(self) -> int:
        return self.count

    def example(self, index: int) -> Conversation:
        return Conversation("1" * (index + 1), "2" * (index + 1))

    def where(self, index: int) -> str:
        return f"chat {index}"


def test_overlong_conversations(tokenizer: Any) -> None:
    encoder = ConversationEncoder(tokenizer, SFTDataConfig())  # a bos token, i + 1 digits, i + 1 digits of answer
    with pytest.raises(
        DataError, match="chat 2: the conversation has 7 tokens, more than policy.max_sequence_length=6"
    ):
        TokenizedConversations(Chats(6), encoder, 6)
    dropped = TokenizedConversations(Chats(6), encoder, 6, "drop")
    assert dropped.counts() == {"conversations": 2, "dropped": 4, "truncated": 0, "tokens": 8, "loss_tokens": 3}
    # The answers of the last two begin behind the limit.
    truncated = TokenizedConversations(Chats(6), encoder, 6, "truncate")
    assert truncated.counts() == {"conversations": 4, "dropped": 2, "truncated": 2, "tokens": 20, "loss_tokens": 6}
    with pytest.raises(DataError, match="all 6 conversations have more than policy.max_sequence_length=2 tokens"):
        TokenizedConversations(Chats(6), encoder, 2, "drop")


def test_digest_changes_with_the_loss_mask(bpe: Any) -> None:
    dataset, _ = load_conversations(SFTDataConfig(train={"max_num_records": 8}))
    tokenizer = make_tokenizer("embedded-chat")
    first, second = (
        TokenizedConversations(dataset, ConversationEncoder(tokenizer, SFTDataConfig(loss_on=loss_on)), 64)
        for loss_on in ("assistant_turns", "last_turn")
    )
    assert first.num_tokens == second.num_tokens
    assert first.digest != second.digest


def test_batch_has_the_layout_of_a_training_batch(tokenizer: Any) -> None:
    conversations = TokenizedConversations(Chats(3), ConversationEncoder(tokenizer, SFTDataConfig()), 16)
    batch = collate_conversations(conversations[:3], pad_token_id=0, row_multiple=2)
    assert batch["input_lengths"].tolist() == [3, 5, 7, 3]
    assert batch["sample_mask"].tolist() == [1, 1, 1, 0]
    assert batch["token_mask"].tolist()[1] == [0, 0, 0, 1, 1, 0, 0]
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"][1].tolist()[5:] == [0, 0]


def test_loader_draws_every_conversation_once_per_epoch_and_resumes(tokenizer: Any) -> None:
    conversations = TokenizedConversations(Chats(6), ConversationEncoder(tokenizer, SFTDataConfig()), 16)

    def collate(rows: Any) -> BatchedDataDict:
        return collate_conversations(rows, 0)

    def loader() -> ExampleLoader[TokenizedConversation]:
        return ExampleLoader(conversations, collate, seed=1, num_epochs=2)

    whole = loader()
    assert whole.num_batches_left(4) == 3
    batches = [whole.next_batch(4) for _ in range(3)]
    assert whole.next_batch(4) is None
    assert whole.epoch == 2.0
    lengths = [length for batch in batches if batch is not None for length in batch["input_lengths"].tolist()]
    assert sorted(lengths[:6]) == sorted(lengths[6:]) == [3, 5, 7, 9, 11, 13]
    assert lengths[:6] != lengths[6:]
    first, resumed = loader(), loader()
    first.next_batch(4)
    resumed.load_state_dict(first.state_dict())
    assert resumed.num_batches_left(4) == 2
    for expected in batches[1:]:
        batch = resumed.next_batch(4)
        assert batch is not None
        assert expected is not None
        assert torch.equal(batch["input_ids"], expected["input_ids"])
    other = TokenizedConversations(Chats(7), ConversationEncoder(tokenizer, SFTDataConfig()), 16)
    with pytest.raises(CheckpointError, match="belongs to other data: num_conversations was 6 and is now 7"):
        ExampleLoader(other, collate, seed=1).load_state_dict(first.state_dict())
