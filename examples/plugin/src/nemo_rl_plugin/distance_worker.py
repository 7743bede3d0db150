"""A worker class that needs an additional package."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein


class DistanceWorker:
    """Computes edit distances."""

    def distance(self, left: str, right: str) -> int:
        """Return the number of edits between two texts."""
        return Levenshtein.distance(left, right)
