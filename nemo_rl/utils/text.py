"""Text of unknown origin, such as completions, for terminals and pages."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Replace every character that is neither printable nor a line break, such as those of escape sequences.

    Example:
        >>> printable("a\x1b[2Jb")
        'a�[2Jb'
    """
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
