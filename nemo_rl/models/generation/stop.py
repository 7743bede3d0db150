"""Stop conditions of a completion: stop tokens, and stop strings in the decoded text."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from nemo_rl.errors import ModelError

_FIRST_WINDOW = 16


class StopRules:
    """Finds where a completion ends by a stop token or a stop string.

    Stop strings are searched in the decoded completion, so their split into tokens does not matter. Decoding after
    every token would cost more than a small model's forward pass. So a completion is decoded only after tokens whose
    text contains the last character of a stop string (or a part of a character): no other token can complete one.

    Args:
        tokenizer: Decodes tokens.
        token_ids: Tokens that end a completion.
        strings: Texts that end a completion. A string that is a special token is treated as a stop token, because
            decoded text omits special tokens.

    Raises:
        ModelError: A stop string is empty.
    """

    def __init__(self, tokenizer: Any, token_ids: Collection[int], strings: Sequence[str]) -> None:
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
        """Return the length of the completion up to and including the token that ends it, or None.

        Args:
            tokens: The completion so far.
            num_checked: Tokens that an earlier call has checked already.
        """
        for index in range(num_checked, len(tokens)):
            token = tokens[index]
            if token in self.token_ids:
                return index + 1
            if self.strings and self._may_complete(token) and self._ends_in_stop_string(tokens[: index + 1]):
                return index + 1
        return None

    def _may_complete(self, token: int) -> bool:
        """Return whether a stop string can end with this token."""
        known = self._completes.get(token)
        if known is None:
            # Decode the token after another one, too: some tokenizers drop a leading space at the start of a text.
            alone, doubled = (self._decode([token] * count) for count in (1, 2))
            text = alone + doubled
            known = "\ufffd" in text or any(character in text for character in self._last_characters)
            self._completes[token] = known
        return known

    def _ends_in_stop_string(self, tokens: Sequence[int]) -> bool:
        """Return whether the text contains a stop string. Earlier tokens are checked, so the tail is sufficient."""
        window = max(_FIRST_WINDOW, 2 * self._longest)
        while True:
            text = self._decode(tokens[-window:])
            # Decode some more characters: those at the start may differ, because the text before them is cut off.
            if window >= len(tokens) or len(text) >= 2 * self._longest + 4:
                return any(string in text for string in self.strings)
            window *= 2

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def end_of_sequence_ids(model_name: str, model_config: Any, tokenizer: Any) -> set[int]:
    """Return the end-of-sequence tokens of `config.json`, of `generation_config.json`, and of the tokenizer.

    Many chat models list the token that ends a turn only in `generation_config.json`.

    Raises:
        ModelError: `generation_config.json` cannot be read, or its `eos_token_id` is neither a token nor a list.
    """
    sources = {
        "config.json": getattr(model_config, "eos_token_id", None),
        "config.json, text_config": getattr(model_config.get_text_config(), "eos_token_id", None),
        "generation_config.json": _generation_config(model_name).get("eos_token_id"),
        "the tokenizer": tokenizer.eos_token_id,
    }
    result: set[int] = set()
    for source, value in sources.items():
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise ModelError(
                f"the model {model_name!r}: eos_token_id of {source} is {value!r}; it must be a token id, a list of "
                "token ids, or null"
            )
        result.update(ids)
    return result


def _generation_config(model_name: str) -> dict[str, Any]:
    """Read the model's `generation_config.json`, from a directory or the hub; empty if there is none."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(
            model_name,
            "generation_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        content = {} if path is None else json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read generation_config.json of the model {model_name!r}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"generation_config.json of the model {model_name!r} is not a JSON object")
    return content
