"""A worker class that needs a package which nobody else has."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein


class DistanceWorker:
    """Says how far two texts are apart."""

    def distance(self, left: str, right: str) -> int:
        """Edits that turn `left` into `right`."""
        return Levenshtein.distance(left, right)
