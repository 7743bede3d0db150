"""The critical path of a start-up."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.observability.critical_path import NOT_RECORDED, Segment, critical_path, startup_events
from nemo_rl.observability.timer import FIRST_STEP, TimelineEvent


def event(
    name: str, start: float, end: float, process: str = "driver", life: int = 1, waits: bool = False
) -> TimelineEvent:
    return TimelineEvent(name, process, "node-0", start, end, life, waits)


def path_of(events: list[TimelineEvent]) -> list[Segment]:
    return critical_path(events, max(e.end for e in events))


def names(segments: list[Segment]) -> list[tuple[str, float, float]]:
    return [(segment.name, segment.start, segment.end) for segment in segments]


def test_sequential_events_with_a_gap() -> None:
    assert names(path_of([event("a", 0, 2), event("b", 3, 5)])) == [
        ("a", 0, 2),
        (NOT_RECORDED, 2, 3),
        ("b", 3, 5),
    ]


def test_nested_event_replaces_the_outer_one() -> None:
    assert names(path_of([event("ray", 0, 10), event("store", 2, 5)])) == [
        ("ray", 0, 2),
        ("store", 2, 5),
        ("ray", 5, 10),
    ]


def test_path_follows_the_last_worker() -> None:
    events = [
        event("start workers", 0, 10, waits=True),
        event("load model", 1, 9.5, "policy-0"),
        event("import torch", 2, 4, "policy-0"),
        event("load model", 1.5, 6, "policy-1"),
    ]
    assert names(path_of(events)) == [
        ("start workers", 0, 1),
        ("load model", 1, 2),
        ("import torch", 2, 4),
        ("load model", 4, 9.5),
        ("start workers", 9.5, 10),
    ]
    assert {segment.process for segment in path_of(events)[1:4]} == {"policy-0"}


def test_parallel_work_counts_while_the_driver_waits() -> None:
    inputs = [event("model", 1, 4, "driver: inputs"), event("data", 4, 9, "driver: inputs")]
    busy = [event("ray", 0, 8), event("train", 8, 12)]
    assert names(path_of([*inputs, *busy])) == [("ray", 0, 8), ("train", 8, 12)]
    waiting = [event("ray", 0, 8), event("wait for inputs", 8, 9.5, waits=True), event("train", 9.5, 12)]
    assert names(path_of([*inputs, *waiting])) == [
        ("ray", 0, 1),
        ("model", 1, 4),
        ("data", 4, 9),
        ("wait for inputs", 9, 9.5),
        ("train", 9.5, 12),
    ]


def test_startup_events_of_the_latest_start() -> None:
    events = [
        event("old", 0, 5),
        event("ray", 100, 104, life=2),
        event("worker", 103, 120, "policy-0", life=2),
        event("later", 111, 112, life=2),
        event(FIRST_STEP, 110, 110, life=2),
    ]
    startup, end = startup_events(events)
    assert [(e.name, e.end) for e in startup] == [("ray", 104), ("worker", 110)]
    assert end == 110
    startup, end = startup_events(events[:3])
    assert [e.name for e in startup] == ["ray", "worker"]
    assert end == 120
    assert startup_events([]) == ([], 0.0)
    assert critical_path([], 0.0) == []


def test_unrecorded_time_is_part_of_the_path() -> None:
    assert names(critical_path([event("ray", 0, 4)], 6.0)) == [("ray", 0, 4), (NOT_RECORDED, 4, 6)]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 50), st.integers(1, 50), st.sampled_from(["driver", "policy-0", "policy-1"]), st.booleans()
        ),
        min_size=1,
    )
)
def test_path_has_no_gaps_and_no_overlap(intervals: list[tuple[int, int, str, bool]]) -> None:
    events = [
        event(f"e{i}", start, start + length, process, waits=waits)
        for i, (start, length, process, waits) in enumerate(intervals)
    ]
    path = path_of(events)
    assert path[0].start == min(e.start for e in events)
    assert path[-1].end == max(e.end for e in events)
    for before, after in itertools.pairwise(path):
        assert before.end == after.start
    for segment in path:
        covering = [e for e in events if e.start < segment.end and e.end > segment.start]
        if segment.name == NOT_RECORDED:
            assert not covering
        else:
            assert any(e.name == segment.name and e.process == segment.process for e in covering)
    assert sum(segment.duration_s for segment in path) == pytest.approx(path[-1].end - path[0].start)
