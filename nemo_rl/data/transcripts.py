"""Continues a transcript, which is token ids, by the observations of an environment.

A transcript never takes the way through text and back: what the model sampled stays as it was sampled. Only the part
between two actions is rendered by the chat template, once, and tokenized::

    prompt | action 1 (sampled) | end of turn, observation, start of the next turn | action 2 (sampled) | ...
                                  └─ `TurnRenderer.continuation` ────────────────┘

The template cannot render this part alone. So a conversation with a marker in the place of the action is rendered, and
the text behind the marker is the continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from nemo_rl.data.config import DataConfig
from nemo_rl.data.problem import ChatMessage
from nemo_rl.data.processing import PromptFormatter, Tokenizer, render_chat
from nemo_rl.errors import ConfigError, DataError

# Letters only, so that no template trims, escapes or parses them, and no prompt contains them by chance.
_MARKERS = ("FirstActionXqzv", "SecondActionXqzv")
_OBSERVATION = "ObservationXqzv"
_THOUGHT = "ThoughtXqzv"
_QUESTION: ChatMessage = {"role": "user", "content": "Question"}


class TurnRenderer:
    """Renders observations as the continuation of sampled tokens.

    Example:

        renderer = TurnRenderer(tokenizer, is_chat=True)
        transcript += sampled
        transcript += renderer.continuation([{"role": "user", "content": "Too low."}], sampled)

    Args:
        tokenizer: The model's tokenizer.
        is_chat: Whether prompts are rendered by the tokenizer's chat template. If not, the texts of the messages are
            appended as they are.
        keep_thinking: Accept a template that removes the thinking of earlier turns. The model then reads its earlier
            thoughts in training, as it sampled them, but not where the template renders its conversations.
        now: See `processing.PromptFormatter`.

    Raises:
        ConfigError: The chat template rejects a second turn, or a later turn changes how it renders an earlier one. A
            transcript of such a template is not what the template itself would render.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, is_chat: bool, keep_thinking: bool = False, now: datetime | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._is_chat = is_chat
        self._now = now or datetime.now()
        if is_chat:
            self._check_template(keep_thinking)

    def continuation(self, messages: Sequence[ChatMessage], sampled: Sequence[int]) -> list[int]:
        """Return the tokens between an action and the next one.

        Args:
            messages: The observation.
            sampled: The tokens of the action. If they end with the token that ends a turn in the template, this token
                is not repeated.

        Raises:
            DataError: The chat template rejects the messages.
        """
        if self._is_chat:
            text = self._render([_QUESTION, _action(_MARKERS[0]), *messages]).rpartition(_MARKERS[0])[2]
        else:
            text = "".join(str(message["content"]) for message in messages)
        [tokens] = self._tokenizer([text], add_special_tokens=False)["input_ids"]
        if self._is_chat and sampled and tokens and sampled[-1] == tokens[0]:
            return list(tokens[1:])
        return list(tokens)

    def _check_template(self, keep_thinking: bool) -> None:
        observation: ChatMessage = {"role": "user", "content": _OBSERVATION}
        first, second = _MARKERS
        try:
            one = self._render([_QUESTION, _action(first), observation])
            two = self._render([_QUESTION, _action(first), observation, _action(second), observation])
            thinking = self._render([_QUESTION, _action(f"<think>\n{_THOUGHT}\n</think>\n\n{first}"), observation])
        except DataError as error:
            raise ConfigError(f"environments with several turns: {error}") from error
        if two.count(first) != 1 or two.count(second) != 1 or not two.startswith(one.partition(first)[0]):
            raise ConfigError(
                "environments with several turns need a chat template that renders each action once and the turns "
                "before it unchanged; that of this tokenizer does not"
            )
        # The start of a turn may differ between the past and the next one, as with an opening <think>.
        last, earlier = (text.partition(first)[2].partition(_OBSERVATION)[0] for text in (one, two))
        if last != earlier:
            raise ConfigError(
                "environments with several turns need a chat template that renders an observation the same way in "
                f"every turn; that of this tokenizer puts {last!r} before the last one and {earlier!r} before another"
            )
        if not keep_thinking and _THOUGHT not in thinking:
            raise ConfigError(
                "the tokenizer's chat template removes the thinking of earlier turns, but a transcript keeps what "
                "was sampled; set data.keep_thinking=true to train on such transcripts"
            )

    def _render(self, messages: Sequence[ChatMessage]) -> str:
        return render_chat(self._tokenizer, messages, self._now, what="the observation")


class TranscriptRenderer:
    """Renders all that a transcript holds beside the sampled tokens: its opening, and its continuations.

    Args:
        tokenizer: The model's tokenizer.
        config: The system prompt, and whether there is a chat template.
        has_turns: Whether a transcript may continue after the first action. See `TurnRenderer` for what it requires.
        keep_thinking, now: See `TurnRenderer`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        has_turns: bool,
        keep_thinking: bool = False,
        now: datetime | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._formatter = PromptFormatter(tokenizer, config, now)
        self._turns = (
            TurnRenderer(tokenizer, is_chat=self._formatter.is_chat, keep_thinking=keep_thinking, now=now)
            if has_turns
            else None
        )

    def opening(self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]], where: str) -> list[int]:
        """Return the tokens that the model reads before its first action. Without a chat template: the joined texts.

        Raises:
            DataError: See `PromptFormatter.text`; or there are no tokens. The message begins with `where`.
        """
        if self._formatter.is_chat:
            text = self._formatter.text(list(messages), where, tools)
        elif tools:
            raise DataError(f"{where}: tools need a chat template, and prompts are not rendered by one")
        else:
            text = "".join(str(message["content"]) for message in messages)
        [tokens] = self._formatter.tokenize([text])
        if not tokens:
            raise DataError(f"{where}: the first observation has no tokens")
        return list(tokens)

    def continuation(self, messages: Sequence[ChatMessage], sampled: Sequence[int]) -> list[int]:
        """See `TurnRenderer.continuation`."""
        assert self._turns is not None, "this transcript has one turn"
        return self._turns.continuation(messages, sampled)

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens as text, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _action(content: str) -> ChatMessage:
    return {"role": "assistant", "content": content}
