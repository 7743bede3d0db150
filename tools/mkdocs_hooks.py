"""Hook of the documentation site: replaces links to files of the repository that are not pages by their text.

These links work only in the repository. A link to a missing file is kept, so that the strict build fails.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Replace the links of a page. MkDocs calls this hook for every page."""

    def plain(match: re.Match[str]) -> str:
        return match[1] if (_ROOT / match[2]).exists() else match[0]

    return _LINK.sub(plain, markdown)
