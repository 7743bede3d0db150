"""Converts conversations to tokens, says which of them are in the loss, and collates them into batches.

The tokens in the loss are those of the assistant's turns, each from behind the start of the turn (what a template
renders with `add_generation_prompt`) to its end, including the token that ends the turn. They are found in two ways:

markers    The chat template marks them by `{% generation %}` ... `{% endgeneration %}`.
rendering  The conversation is rendered up to the start of a turn and up to its end. Both texts must be beginnings of
           the rendered conversation; this is checked for every turn of every record. Templates that change a turn when
           the conversation continues (some remove the thinking of earlier turns) are refused.

A conversation is rendered and tokenized once, as a whole. A token belongs to a turn if one of its characters does.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from nemo_rl.data.config import SFTDataConfig
from nemo_rl.data.conversations import Conversation, ConversationDataset
from nemo_rl.data.loader import EpochOrder
from nemo_rl.data.problem import ChatMessage
from nemo_rl.data.processing import check_template_is_stable, num_appended, render_chat
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BATCH_SIZE = 1024

# Start and end of a turn, in characters of a text.
_Span = tuple[int, int]


@dataclass(frozen=True)
class TokenizedConversation:
    """The tokens of a conversation.

    Attributes:
        input_ids: int32 [length].
        in_loss: bool [length]; False for the first token, which nothing predicts.
    """

    input_ids: NDArray[np.int32]
    in_loss: NDArray[np.bool_]


class ConversationEncoder:
    """Tokenizes conversations and finds the tokens in the loss.

    Example:

        encoder = ConversationEncoder(tokenizer, SFTDataConfig())
        [encoded] = encoder.encode([conversation], ["chats.jsonl:1"])
        print(tokenizer.decode(encoded.input_ids[encoded.in_loss]))

    Args:
        tokenizer: A fast tokenizer, which knows the characters of each token.
        config: Which turns are in the loss, how they are found, and the system prompt.
        now: See `processing.PromptFormatter`.

    Raises:
        ConfigError: The tokenizer is not fast, the chat template has no markers but the configuration asks for them, it
            draws random values, or there is a system prompt but no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: SFTDataConfig, now: datetime | None = None) -> None:
        self._tokenizer: Any = tokenizer
        self._config = config
        self._now = now or datetime.now()
        self._has_template = bool(tokenizer.chat_template)
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so it does not tell which characters a token "
                "has, and supervised fine-tuning needs that; set policy.tokenizer_name to a model with tokenizer.json"
            )
        if config.system_prompt is not None and not self._has_template:
            raise ConfigError("data.system_prompt needs a chat model, but the tokenizer has no chat template")
        if self._has_template:
            check_template_is_stable(tokenizer.chat_template)
        self._num_appended = num_appended(self._tokenizer)

    def encode(self, conversations: Sequence[Conversation], where: Sequence[str]) -> list[TokenizedConversation]:
        """Tokenize conversations; `where` names their records in messages.

        Raises:
            ConfigError: The chat template has no markers but the configuration asks for them.
            DataError: There is no turn of the assistant, the chat template rejects a conversation or does not show its
                turns as described in this module, or a list of messages meets a tokenizer without a chat template.
        """
        encoded: dict[int, TokenizedConversation] = {}
        rendered: dict[int, tuple[str, list[_Span]]] = {}
        for index, (conversation, place) in enumerate(zip(conversations, where, strict=True)):
            messages = self._messages(conversation, place)
            if messages is None:
                encoded[index] = self._encode_text(conversation)
                continue
            turns = self._turns(messages, len(messages) - self._num_completion(conversation), place)
            if self._uses_markers(conversation.tools):
                encoded[index] = self._encode_by_markers(messages, conversation.tools, turns, place)
            else:
                rendered[index] = self._render(messages, conversation.tools, turns, place)
        if rendered:
            texts = [text for text, _ in rendered.values()]
            tokens = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for row, (index, (_, spans)) in enumerate(rendered.items()):
                encoded[index] = _with_mask(tokens["input_ids"][row], tokens["offset_mapping"][row], spans)
        for index, place in enumerate(where):
            if not encoded[index].in_loss.any():
                raise DataError(f"{place}: no token of the conversation is in the loss")
        return [encoded[index] for index in range(len(where))]

    def _messages(self, conversation: Conversation, where: str) -> list[ChatMessage] | None:
        """Return a conversation as chat messages, or None if it is text that no template renders."""
        prompt, completion = conversation.prompt, conversation.completion
        messages: list[ChatMessage]
        if isinstance(completion, str):
            if not (self._has_template and self._config.apply_chat_template):
                return None
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        else:
            assert not isinstance(prompt, str), "a conversation is all text or all chat messages"
            messages = [*prompt, *completion]
        if not self._has_template:
            raise DataError(f"{where}: the record has chat messages, but the tokenizer has no chat template")
        if self._config.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._config.system_prompt}, *messages]
        return messages

    @staticmethod
    def _num_completion(conversation: Conversation) -> int:
        return 1 if isinstance(conversation.completion, str) else len(conversation.completion)

    def _turns(self, messages: list[ChatMessage], first: int, where: str) -> list[int]:
        """Return the indices of the messages in the loss."""
        turns = [index for index, message in enumerate(messages) if index >= first and message["role"] == "assistant"]
        if not turns:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages[first:]))
            raise DataError(f"{where}: there is no turn of the assistant to learn; the roles are: {roles}")
        return turns if self._config.loss_on == "assistant_turns" else turns[-1:]

    def _uses_markers(self, tools: list[dict[str, Any]]) -> bool:
        if self._config.mask == "rendering":
            return False
        template = self._tokenizer.get_chat_template(tools=tools or None)
        if _MARKER.search(template):
            return True
        if self._config.mask == "markers":
            raise ConfigError(
                "data.mask=markers, but the tokenizer's chat template has no {% generation %} markers; add them to the "
                "template, or set data.mask=rendering"
            )
        return False

    def _encode_text(self, conversation: Conversation) -> TokenizedConversation:
        prompt, completion = str(conversation.prompt), str(conversation.completion)
        tokens = self._tokenizer([prompt + completion], add_special_tokens=True, return_offsets_mapping=True)
        [ids], [offsets] = tokens["input_ids"], tokens["offset_mapping"]
        end = len(ids) - self._num_appended
        encoded = _with_mask(ids[:end], offsets[:end], [(len(prompt), len(prompt) + len(completion))])
        eos = self._tokenizer.eos_token_id
        if eos is None:
            return encoded
        return TokenizedConversation(
            np.append(encoded.input_ids, np.int32(eos)), np.append(encoded.in_loss, len(encoded.in_loss) > 0)
        )

    def _encode_by_markers(
        self, messages: list[ChatMessage], tools: list[dict[str, Any]], turns: list[int], where: str
    ) -> TokenizedConversation:
        variables: dict[str, Any] = {"tools": tools} if tools else {}
        try:
            tokens = self._tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
                strftime_now=self._now.strftime,
                **variables,
            )
        except Exception as error:  # see `render_chat`
            raise DataError(f"{where}: the tokenizer's chat template rejects the conversation: {error}") from error
        in_loss = np.asarray(tokens["assistant_masks"], dtype=np.bool_)
        is_first = not any(message["role"] == "assistant" for message in messages[: turns[0]])
        if not is_first:  # the markers enclose earlier turns, too
            _, [(start, _), *_] = self._render(messages, tools, turns[:1], where)
            in_loss &= np.asarray(tokens["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1] > start
        if not in_loss.any():
            raise DataError(f"{where}: the markers of the tokenizer's chat template enclose no token of the assistant")
        return _without_first(np.asarray(tokens["input_ids"], dtype=np.int32), in_loss)

    def _render(
        self, messages: list[ChatMessage], tools: list[dict[str, Any]], turns: list[int], where: str
    ) -> tuple[str, list[_Span]]:
        """Return the text of a conversation and the characters of the turns in the loss."""

        def text(count: int, opens_turn: bool) -> str:
            what = "the conversation"
            try:
                return render_chat(
                    self._tokenizer, messages[:count], self._now, tools=tools, what=what, opens_turn=opens_turn
                )
            except DataError as error:
                raise DataError(f"{where}: {error}") from error

        complete = text(len(messages), False)
        spans = []
        for index in turns:
            if index == 0:
                raise DataError(f"{where}: the conversation begins with the assistant, so its turn has no prompt")
            before = text(index, True)
            through = complete if index + 1 == len(messages) else text(index + 1, False)
            if not complete.startswith(before) or not complete.startswith(through) or len(before) >= len(through):
                raise DataError(
                    f"{where}: the tokenizer's chat template renders message {index + 1} (assistant) or those before "
                    "it differently when the conversation continues, so its tokens cannot be found; add "
                    "{% generation %} markers to the template, or set data.loss_on=last_turn"
                )
            spans.append((len(before), len(through)))
        return complete, spans


def _with_mask(ids: Sequence[int], offsets: Sequence[_Span], spans: Sequence[_Span]) -> TokenizedConversation:
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    in_loss = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        in_loss |= (ends > start) & (starts < end) & (ends > starts)
    return _without_first(np.asarray(ids, dtype=np.int32), in_loss)


def _without_first(ids: NDArray[np.int32], in_loss: NDArray[np.bool_]) -> TokenizedConversation:
    in_loss[:1] = False
    return TokenizedConversation(ids, in_loss)


class TokenizedConversations(Sequence[TokenizedConversation]):
    """Tokenizes all conversations of a data set once, before any worker starts. Memory holds 5 bytes per token.

    Args:
        dataset: The conversations.
        encoder: Tokenizes them.
        max_length: Longest conversation in tokens (`policy.max_sequence_length`).
        overlong: What to do with longer ones; see `data.overlong`. A truncated conversation whose remaining tokens are
            all outside the loss is dropped.

    Attributes:
        num_dropped, num_truncated: Number of conversations that were too long.
        num_tokens, num_loss_tokens: Tokens of all conversations that are left.
        digest: Changes with any token and with the loss mask.

    Raises:
        ConfigError, DataError: See `ConversationEncoder`. Or a conversation is too long and such ones are not dropped,
            or none is left.
    """

    def __init__(
        self, dataset: ConversationDataset, encoder: ConversationEncoder, max_length: int, overlong: str = "error"
    ) -> None:
        ids, in_loss, offsets = array("i"), bytearray(), array("q", [0])
        digest = xxhash.xxh3_64()
        longest = self.num_dropped = self.num_truncated = 0
        for start in range(0, len(dataset), _BATCH_SIZE):
            indices = range(start, min(start + _BATCH_SIZE, len(dataset)))
            where = [dataset.where(index) for index in indices]
            for place, item in zip(where, encoder.encode([dataset[index] for index in indices], where)):
                length = len(item.input_ids)
                longest = max(longest, length)
                if length > max_length and overlong == "error":
                    raise DataError(
                        f"{place}: the conversation has {length} tokens, more than policy.max_sequence_length="
                        f"{max_length}; raise that, or set data.overlong=drop or truncate"
                    )
                kept = slice(max_length)
                if length > max_length and (overlong == "drop" or not item.in_loss[kept].any()):
                    self.num_dropped += 1
                    continue
                self.num_truncated += length > max_length
                ids.frombytes(item.input_ids[kept].tobytes())
                in_loss += item.in_loss[kept].tobytes()
                offsets.append(len(ids))
                digest.update(item.input_ids[kept].tobytes())
                digest.update(item.in_loss[kept].tobytes())
        self._ids, self._offsets = np.asarray(ids, dtype=np.int32), np.asarray(offsets)
        self._in_loss = np.frombuffer(bytes(in_loss), dtype=np.bool_)
        self.digest: str = digest.hexdigest()
        self.num_tokens, self.num_loss_tokens = len(self._ids), int(self._in_loss.sum())
        if self.num_dropped or self.num_truncated:
            what = f"more than policy.max_sequence_length={max_length} tokens (the longest has {longest})"
            if not len(self):
                raise DataError(f"all {len(dataset)} conversations have {what}; raise it")
            logger.warning(
                "of %d conversations with %s, %d are truncated and %d dropped",
                self.num_dropped + self.num_truncated,
                what,
                self.num_truncated,
                self.num_dropped,
            )

    def counts(self) -> dict[str, int]:
        """Return the numbers of conversations and tokens, for the record of a run."""
        return {
            "conversations": len(self),
            "dropped": self.num_dropped,
            "truncated": self.num_truncated,
            "tokens": self.num_tokens,
            "loss_tokens": self.num_loss_tokens,
        }

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"conversation {index} is out of range: there are {len(self)}")
        part = slice(self._offsets[position], self._offsets[position + 1])
        return TokenizedConversation(self._ids[part], self._in_loss[part])


class ConversationLoader:
    """Iterates over conversations epoch after epoch, see `EpochOrder`.

    Every batch is full. Conversations that do not fill a batch at the end of the last epoch are not used.

    Args:
        conversations: The conversations.
        pad_token_id: See `collate_conversations`.
        seed: Decides the order of every epoch.
        shuffle: False keeps the data set's order in every epoch.
        num_epochs: Number of epochs. None: no limit.
    """

    def __init__(
        self,
        conversations: TokenizedConversations,
        pad_token_id: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int | None = None,
    ) -> None:
        self._conversations, self._pad_token_id = conversations, pad_token_id
        self._order = EpochOrder(
            len(conversations),
            conversations.digest,
            seed=seed,
            shuffle=shuffle,
            num_epochs=num_epochs,
            items="conversations",
        )

    @property
    def epoch(self) -> float:
        """Number of epochs so far."""
        return self._order.num_drawn / len(self._conversations)

    def num_batches_left(self, size: int) -> int | None:
        """Return the number of batches of `size` that are left in all epochs, or None without a limit."""
        left = self._order.num_left
        return None if left is None else max(left, 0) // size

    def next_batch(self, size: int) -> BatchedDataDict | None:
        """Return the next batch (see `collate_conversations`), or None if fewer conversations are left."""
        drawn = self._order.draw(size)
        if drawn is None:
            return None
        return collate_conversations([self._conversations[index] for index in drawn], self._pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain data, see `EpochOrder.state_dict`."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, see `EpochOrder.load_state_dict`. Raises `CheckpointError`."""
        self._order.load_state_dict(state)


def collate_conversations(
    conversations: Sequence[TokenizedConversation], pad_token_id: int, row_multiple: int = 1
) -> BatchedDataDict:
    """Collate conversations into a training batch, padded on the right.

    Args:
        conversations: At least one conversation.
        pad_token_id: Pads rows to the length of the longest conversation.
        row_multiple: Rows are added until their number is a multiple of this; their `sample_mask` is 0.

    Returns:
        `input_ids`, `input_lengths`, `token_mask` and `sample_mask`, in the layout of `models.policy.interfaces`.
    """
    num_real = len(conversations)
    rows = [*conversations, *[conversations[0]] * (-num_real % row_multiple)]
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    input_ids = torch.full((len(rows), int(lengths.max())), pad_token_id)
    token_mask = torch.zeros(input_ids.shape)
    sample_mask = torch.zeros(len(rows))
    sample_mask[:num_real] = 1.0
    for index, row in enumerate(rows):
        input_ids[index, : lengths[index]] = torch.from_numpy(row.input_ids.astype(np.int64))
        token_mask[index, : lengths[index]] = torch.from_numpy(row.in_loss.astype(np.float32))
    return BatchedDataDict(input_ids=input_ids, input_lengths=lengths, token_mask=token_mask, sample_mask=sample_mask)
