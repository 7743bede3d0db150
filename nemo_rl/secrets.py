"""Configurations that may be shown: secrets are replaced before they leave the process."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_rl import settings

# Matches the end of a key: `max_new_tokens`, `pad_token_id` and `tokenizer_name` are no secrets.
_SECRET_KEY = re.compile(
    r"(?:^|[_.])(?:token|secret|password|passwd|api_?key|access_key|private_key|credentials?)$", re.I
)
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def mask_secrets(value: Any, key: str = "") -> Any:
    """A copy of nested plain data: texts under keys that look secret become `settings.MASK`, as do user and password
    in addresses."""
    if isinstance(value, Mapping):
        return {name: mask_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [mask_secrets(item, key) for item in value]
    if isinstance(value, str):
        return settings.MASK if _SECRET_KEY.search(key) else _URL_PASSWORD.sub(settings.MASK, value)
    return value


def is_secret_key(key: str) -> bool:
    """Whether the name of a value says that it must not be shown."""
    return _SECRET_KEY.search(key) is not None


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; an empty section is a value."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
