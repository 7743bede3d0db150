"""Converts conversations to tokens, and says which of them are in the loss.

The tokens in the loss are those of the assistant's turns, each from behind the start of the turn (what a template
renders with `add_generation_prompt`) to its end, including the token that ends the turn. They are found in two ways:

markers    The chat template marks them by `{% generation %}` ... `{% endgeneration %}`.
rendering  The conversation is rendered up to the start of a turn and up to its end. Both texts must be beginnings of
           the rendered conversation; this is checked for every turn of every record. Templates that change a turn when
           the conversation continues (some remove the thinking of earlier turns) are refused.

A conversation is rendered and tokenized once, as a whole. A token belongs to a turn if one of its characters does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_rl.data.config import ChatDataConfig
from nemo_rl.data.conversations import Conversation
from nemo_rl.data.problem import ChatMessage
from nemo_rl.data.processing import check_template_is_stable, num_appended, render_chat
from nemo_rl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

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

        encoder = ConversationEncoder(tokenizer, ChatDataConfig())
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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ChatDataConfig, now: datetime | None = None) -> None:
        self._tokenizer: Any = tokenizer
        self._config = config
        self._now = now or datetime.now()
        self._has_template = bool(tokenizer.chat_template)
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so it does not tell which characters a token "
                "has, and the mask of the loss needs that; set policy.tokenizer_name to a model with tokenizer.json"
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
