"""Computes the critical path of a start-up: the events that determined its duration.

The events of a timeline overlap: the driver waits while workers import and load, and workers load in parallel. The
critical path is traced backwards from the end. At every moment, it follows the most specific event that was active in
the current process. If that event waited for other processes (`TimelineEvent.waits`), the path continues with the event
that ended last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_rl.observability.timer import DRIVER, FIRST_STEP, TimelineEvent

NOT_RECORDED = "not recorded"
# Shorter segments are the overhead between two events.
_SHORTEST_S = 0.001


@dataclass(frozen=True)
class Segment:
    """Describes a segment of the critical path: the start-up waited for `name` in `process` from `start` to `end`."""

    name: str
    process: str
    start: float
    end: float

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.end - self.start


def startup_events(events: Sequence[TimelineEvent]) -> tuple[list[TimelineEvent], float]:
    """Return the events of the latest start-up and the time at which it ended.

    The events are sorted by start, without events of zero duration. The start-up ends with the first step; events that
    last longer are clipped. If the run has not reached a first step, all of its events belong to the start-up.
    """
    life = max((event.life for event in events), default=0)
    latest = [event for event in events if event.life == life]
    first_steps = [event.end for event in latest if event.name == FIRST_STEP]
    end = min(first_steps) if first_steps else max((event.end for event in latest), default=0.0)
    within = [event for event in latest if event.start < end and event.duration_s > 0]
    return sorted((_clipped(event, end) for event in within), key=lambda event: (event.start, -event.end)), end


def critical_path(events: Sequence[TimelineEvent], end: float) -> list[Segment]:
    """Return the segments of the critical path in order of time.

    Args:
        events: the events of a start-up.
        end: the end of the path; no event ends later.

    Returns:
        Segments without gaps, from the first start of `events` to `end`.
    """
    if not events:
        return []
    first, now = min(event.start for event in events), end
    segments: list[Segment] = []
    process, waits = DRIVER, True  # the first step waits for the event that ended last
    while now - first > 0:
        event = _active_event(events, now, process, waits)
        if event is None:
            start = max(other.end for other in events if other.end < now)
            segments.append(Segment(NOT_RECORDED, "", start, now))
        else:
            # Go back to the last end of an event that this event contains or waited for.
            inner = (other.end for other in events if event.start < other.end < now and _depends(event, other))
            start = max([event.start, *inner])
            process, waits = event.process, event.waits
            segments.append(Segment(event.name, event.process, start, now))
        now = segments[-1].start
    return _merged(list(reversed(segments)))


def _active_event(events: Sequence[TimelineEvent], now: float, process: str, waits: bool) -> TimelineEvent | None:
    """Return the event to follow backwards from `now`.

    In this order: an event that ended at `now` and that the current event waited for, an event of the same process, an
    event of the driver, any event.

    Args:
        events: the events of the start-up.
        now: the current time on the path.
        process: the process of the current event.
        waits: whether the current event waited for other processes.
    """
    active = [event for event in events if event.start < now <= event.end]
    choices = (
        [event for event in active if event.end == now and (waits or event.process == process)],
        [event for event in active if event.process == process],
        [event for event in active if event.process == DRIVER],
        active,
    )
    candidates: list[TimelineEvent] = next(filter(None, choices), [])
    return max(candidates, key=lambda event: (event.start, -event.end), default=None)


def _depends(event: TimelineEvent, other: TimelineEvent) -> bool:
    if other.process == event.process:
        return other.start >= event.start and other is not event
    return event.waits


def _clipped(event: TimelineEvent, end: float) -> TimelineEvent:
    if event.end <= end:
        return event
    return TimelineEvent(event.name, event.process, event.node, event.start, end, event.life, event.waits)


def _merged(segments: list[Segment]) -> list[Segment]:
    """Merge adjacent segments of the same event, and merge very short segments into the next one."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last is not None and last.duration_s < _SHORTEST_S:
            merged[-1] = Segment(segment.name, segment.process, last.start, segment.end)
        elif last is not None and (last.name, last.process) == (segment.name, segment.process):
            merged[-1] = Segment(last.name, last.process, last.start, segment.end)
        else:
            merged.append(segment)
    return merged
