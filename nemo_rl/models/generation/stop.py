"""When a completion ends: stop tokens, and stop strings found in the decoded text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from nemo_rl.errors import ModelError

_FIRST_WINDOW = 16


class StopRules:
    """Stop tokens and stop strings of one generator.

    A stop string is looked for in the decoded completion, so it does not matter how it is split into tokens. Decoding
    after every token would cost more than a small model's forward pass, so it happens only after tokens whose own
    text holds the last character of a stop string (or a part of a character): no other token can complete one.
    """

    def __init__(self, tokenizer: Any, token_ids: Collection[int], strings: Sequence[str]) -> None:
        """A stop string that is exactly a special token (which decoded text leaves out) stops as a token."""
        if any(not string for string in strings):
            raise ModelError("an empty stop string would end every completion before its first token")
        special = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
        self.token_ids = frozenset(token_ids) | {special[string] for string in strings if string in special}
        self.strings = tuple(string for string in strings if string not in special)
        self._last_characters = {string[-1] for string in self.strings}
        self._longest = max((len(string) for string in self.strings), default=0)
        self._tokenizer = tokenizer
        self._completes: dict[int, bool] = {}

    def first_end(self, tokens: Sequence[int], num_checked: int) -> int | None:
        """Length of the completion up to and including the token that ends it, or None.

        Args:
            tokens: the completion so far.
            num_checked: how many of them an earlier call has found not to end it.
        """
        for index in range(num_checked, len(tokens)):
            token = tokens[index]
            if token in self.token_ids:
                return index + 1
            if self.strings and self._may_complete(token) and self._ends_in_stop_string(tokens[: index + 1]):
                return index + 1
        return None

    def _may_complete(self, token: int) -> bool:
        known = self._completes.get(token)
        if known is None:
            # In context, because some tokenizers drop a leading space at the start of a text.
            alone, doubled = (self._decode([token] * count) for count in (1, 2))
            text = alone + doubled
            known = "\ufffd" in text or any(character in text for character in self._last_characters)
            self._completes[token] = known
        return known

    def _ends_in_stop_string(self, tokens: Sequence[int]) -> bool:
        """Whether the text holds a stop string. It cannot have ended earlier, so the tail of the text is enough."""
        window = max(_FIRST_WINDOW, 2 * self._longest)
        while True:
            text = self._decode(tokens[-window:])
            # Beyond the string itself, some characters whose look may depend on what was cut off before them.
            if window >= len(tokens) or len(text) >= 2 * self._longest + 4:
                return any(string in text for string in self.strings)
            window *= 2

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def end_of_sequence_ids(model_config: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text, by the model's configuration and by its tokenizer."""
    configured = getattr(model_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None}
