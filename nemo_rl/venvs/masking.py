"""Keep credentials out of logs, manifests and errors."""

from __future__ import annotations

import re

from nemo_rl import settings

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"`]+@")
_MIN_LENGTH = 4


def mask_secrets(text: str) -> str:
    """`text` without credentials in URLs and without the values of variables that hold an index's credentials."""
    text = _CREDENTIALS.sub(f"{settings.MASK}@", text)
    for name, value in settings.snapshot().items():
        if name.startswith("UV_INDEX_") and settings.is_secret(name) and len(value) >= _MIN_LENGTH:
            text = text.replace(value, settings.MASK)
    return text
