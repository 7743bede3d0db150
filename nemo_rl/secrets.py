"""Replace secrets in text and configurations before they reach a log, manifest, report or error message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from nemo_rl import settings

# Matches the end of a key: `max_new_tokens`, `pad_token_id` and `tokenizer_name` are no secrets.
_SECRET_KEY = re.compile(
    r"(?:^|[_.])(?:token|secret|password|passwd|api_?key|access_key|private_key|credentials?)$", re.I
)
# The user info of a URL ends at the last "@" before the path, because a password may contain one.
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]+(?=@)")
# User info that grants access: a password, or with HTTP a user name alone, which may be a token. It is none in
# `ssh://git@host` and `abfss://container@account`.
_URL_ACCESS = re.compile(r"(?:https?://[^/?#\s]+|://[^/?#\s]*:[^/?#\s]+)@", re.I)
_URL_PARAMETER = re.compile(
    r"([?&](?:[\w.-]+[_.-])?(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|signature|sig|credential)=)"
    r"[^&#\s\"'`]+",
    re.I,
)
# A shorter value of a `UV_INDEX_*` variable would match unrelated text.
_MIN_CREDENTIAL_LENGTH = 4


@overload
def mask_secrets(value: str, key: str = "") -> str: ...
@overload
def mask_secrets(value: Any, key: str = "") -> Any: ...
def mask_secrets(value: Any, key: str = "") -> Any:
    """Return a copy of text or nested plain data with `settings.MASK` in place of every secret.

    Secrets are: strings under a key that looks secret (see `is_secret_key`), user names and passwords in URLs, URL
    parameters such as `token` and `X-Amz-Signature`, and the values of environment variables that hold a package
    index's credentials (`UV_INDEX_..._PASSWORD`).

    Args:
        value: a string, or mappings and lists of plain values; values of other types are returned unchanged.
        key: the name under which `value` is stored.

    Example:
        >>> mask_secrets("https://user:pass@host/simple")
        'https://********@host/simple'
        >>> mask_secrets({"api_key": "abc", "max_new_tokens": 32})
        {'api_key': '********', 'max_new_tokens': 32}
    """
    return _masked(value, key, _index_credentials())


def _masked(value: Any, key: str, credentials: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _masked(item, str(name), credentials) for name, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, key, credentials) for item in value]
    if isinstance(value, str):
        return settings.MASK if is_secret_key(key) else _mask_text(value, credentials)
    return value


def _index_credentials() -> list[str]:
    """Return the values of environment variables that hold a package index's credentials."""
    return [
        value
        for name, value in settings.snapshot().items()
        if name.startswith("UV_INDEX_") and settings.is_secret(name) and len(value) >= _MIN_CREDENTIAL_LENGTH
    ]


def _mask_text(text: str, credentials: Sequence[str]) -> str:
    text = _URL_CREDENTIALS.sub(settings.MASK, text)
    text = _URL_PARAMETER.sub(rf"\1{settings.MASK}", text)
    for value in credentials:
        text = text.replace(value, settings.MASK)
    return text


def is_secret_key(key: str) -> bool:
    """Return whether the value under this key must not be shown.

    Example:
        >>> is_secret_key("hub_token"), is_secret_key("max_new_tokens")
        (True, False)
    """
    return _SECRET_KEY.search(key) is not None


def has_credentials(text: str) -> bool:
    """Return whether text contains a URL that grants access: with a password, an HTTP user name, or a token parameter.

    Example:
        >>> has_credentials("https://user:pass@host"), has_credentials("ssh://git@host/repository")
        (True, False)
    """
    return _URL_ACCESS.search(text) is not None or _URL_PARAMETER.search(text) is not None


def is_secret_variable(name: str, value: str) -> bool:
    """Return whether the value of an environment variable must not be shown, by its name or by its value.

    Example:
        >>> is_secret_variable("HF_TOKEN", "abc"), is_secret_variable("HTTPS_PROXY", "http://user:pass@proxy:8080")
        (True, True)
        >>> is_secret_variable("HTTPS_PROXY", "http://proxy:8080")
        False
    """
    return settings.is_secret(name) or has_credentials(value)


def secret_words(words: Sequence[str]) -> Iterator[str]:
    """Yield a description of each secret value in a command: its option or variable, or the place of its URL.

    A value is secret if its option or variable looks secret (`--api-key=V`, `--api-key V`, `HF_TOKEN=V`) or if it is a
    URL with credentials. Words with blanks, such as the script of `bash -c`, are searched as several words.

    Example:
        >>> list(secret_words(["run", "--api-key", "abc", "--index", "https://user:pass@host/simple"]))
        ['--api-key', 'the URL with credentials in word 5']
    """
    parts = [(part, position) for position, word in enumerate(words, start=1) for part in word.split()]
    for index, (part, position) in enumerate(parts):
        name, equals, value = part.partition("=")
        following = parts[index + 1][0] if index + 1 < len(parts) else ""
        if equals and value and _names_secret(name):
            yield mask_secrets(name)
        elif not equals and name.startswith("-") and following and following[0] != "-" and _names_secret(name):
            yield name
        elif has_credentials(part):
            yield f"the URL with credentials in word {position}"


def _names_secret(option: str) -> bool:
    name = option.strip("-+~\"'").replace("-", "_")
    return is_secret_key(name) or (name.isupper() and settings.is_secret(name))


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
