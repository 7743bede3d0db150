"""A worker class. Only its own venv imports this module, so the driver does not need rapidfuzz."""

from rapidfuzz.distance import Levenshtein


class DistanceWorker:
    """Computes edit distances."""

    def distance(self, left: str, right: str) -> int:
        """Return the number of edits between two texts."""
        return Levenshtein.distance(left, right)
