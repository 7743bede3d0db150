"""Run with the packages of the worker: `uv run --extra distance --group test pytest`."""

from my_project.distance_worker import DistanceWorker


def test_distance_counts_edits() -> None:
    assert DistanceWorker().distance("kitten", "sitting") == 3
