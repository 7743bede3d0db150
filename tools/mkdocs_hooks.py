"""For the documentation site: links to files of the repository that are no pages become plain text.

They are links where the repository is read. A link to a file that does not exist stays, and fails the strict build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Called by mkdocs with the text of every page."""

    def plain(match: re.Match[str]) -> str:
        return match[1] if (_ROOT / match[2]).exists() else match[0]

    return _LINK.sub(plain, markdown)
