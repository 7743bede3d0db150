"""Suggestions for misspelled names, and abbreviated lists of names, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# Lowest similarity (difflib's ratio, 0 to 1) of a name that is suggested.
_MIN_SIMILARITY = 0.5


def nearest_names(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return at most `count` known names that resemble `name`, the most similar first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=_MIN_SIMILARITY)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" with the nearest known name, or an empty string if no name is near.

    Example:
        >>> did_you_mean("sed", ["seed", "steps"])
        " Did you mean 'seed'?"
    """
    near = nearest_names(name, known)
    return f" Did you mean {near[0]!r}?" if near else ""


def suggest_or_list(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or `; there are: a, b` if none is similar."""
    names = [str(candidate) for candidate in known]
    near = nearest_names(name, names)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(sorted(names)) or 'none'}"


def abbreviated(names: Sequence[str], limit: int = 3) -> str:
    """Return the first `limit` names and the number of the others: `a, b, c and 4 more`; `none` for no names."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"
