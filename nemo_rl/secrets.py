"""Replace secrets in text and configurations before they reach a log, manifest, report or error message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, overload

from nemo_rl import settings

# Matches the end of a key: `max_new_tokens`, `pad_token_id` and `tokenizer_name` are no secrets.
_SECRET_KEY = re.compile(
    r"(?:^|[_.])(?:token|secret|password|passwd|api_?key|access_key|private_key|credentials?)$", re.I
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
# A shorter value of a `UV_INDEX_*` variable would match unrelated text.
_MIN_CREDENTIAL_LENGTH = 4


@overload
def mask_secrets(value: str, key: str = "") -> str: ...
@overload
def mask_secrets(value: Any, key: str = "") -> Any: ...
def mask_secrets(value: Any, key: str = "") -> Any:
    """Return a copy of text or nested plain data with `settings.MASK` in place of every secret.

    Secrets are: strings under a key that looks secret (see `is_secret_key`), user names and passwords in URLs, and the
    values of environment variables that hold a package index's credentials (`UV_INDEX_..._PASSWORD`).

    Args:
        value: a string, or mappings and lists of plain values; values of other types are returned unchanged.
        key: the name under which `value` is stored.

    Example:
        >>> mask_secrets("https://user:pass@host/simple")
        'https://********@host/simple'
        >>> mask_secrets({"api_key": "abc", "max_new_tokens": 32})
        {'api_key': '********', 'max_new_tokens': 32}
    """
    if isinstance(value, Mapping):
        return {name: mask_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [mask_secrets(item, key) for item in value]
    if isinstance(value, str):
        return settings.MASK if is_secret_key(key) else _mask_text(value)
    return value


def _mask_text(text: str) -> str:
    text = _URL_CREDENTIALS.sub(settings.MASK, text)
    for name, value in settings.snapshot().items():
        if name.startswith("UV_INDEX_") and settings.is_secret(name) and len(value) >= _MIN_CREDENTIAL_LENGTH:
            text = text.replace(value, settings.MASK)
    return text


def is_secret_key(key: str) -> bool:
    """Return whether the value under this key must not be shown.

    Example:
        >>> is_secret_key("hub_token"), is_secret_key("max_new_tokens")
        (True, False)
    """
    return _SECRET_KEY.search(key) is not None


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of a nested mapping. An empty mapping counts as a value.

    Example:
        >>> dict(flatten({"outer": {"inner": 1}, "empty": {}}))
        {'outer.inner': 1, 'empty': {}}
    """
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
