"""What a start-up waited for, second by second.

The events of a time line overlap: the driver waits while workers import and load, and workers load side by side. The
critical path is found backwards from the end: at every moment it follows the most specific event that was then going
on in its process, and where that one waited for others (`TimelineEvent.waits`), the one of them that ended last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_rl.observability.timer import DRIVER, FIRST_STEP, TimelineEvent

NOT_RECORDED = "not recorded"
# Shorter pieces are the cost of passing from one event to the next.
_SHORTEST_S = 0.001


@dataclass(frozen=True)
class Segment:
    """One piece of the critical path: from `start` to `end` the start-up waited for `name` in `process`."""

    name: str
    process: str
    start: float
    end: float

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.end - self.start


def startup_events(events: Sequence[TimelineEvent]) -> tuple[list[TimelineEvent], float]:
    """The start-up of the last life: its events, oldest first and without instants, and when it ended.

    It ends with the first step; events that go on are cut off there. A life that never came to a first step is a
    start-up as a whole.
    """
    life = max((event.life for event in events), default=0)
    own = [event for event in events if event.life == life]
    first_steps = [event.end for event in own if event.name == FIRST_STEP]
    end = min(first_steps) if first_steps else max((event.end for event in own), default=0.0)
    within = [event for event in own if event.start < end and event.duration_s > 0]
    return sorted((_cut(event, end) for event in within), key=lambda event: (event.start, -event.end)), end


def critical_path(events: Sequence[TimelineEvent], end: float) -> list[Segment]:
    """The pieces, oldest first, without gaps from the first start of `events` to `end`, which is after all of them."""
    if not events:
        return []
    first, now = min(event.start for event in events), end
    segments: list[Segment] = []
    process, waits = DRIVER, True  # the first step waits for whatever ended last
    while now - first > 0:
        event = _going_on(events, now, process, waits)
        if event is None:
            start = max(other.end for other in events if other.end < now)
            segments.append(Segment(NOT_RECORDED, "", start, now))
        else:
            # Back to the last end of something that this event contains, or waited for.
            inner = (other.end for other in events if event.start < other.end < now and _depends(event, other))
            start = max([event.start, *inner])
            process, waits = event.process, event.waits
            segments.append(Segment(event.name, event.process, start, now))
        now = segments[-1].start
    return _merged(list(reversed(segments)))


def _going_on(events: Sequence[TimelineEvent], now: float, process: str, waits: bool) -> TimelineEvent | None:
    """What to follow back from `now`, being in an event of `process` that `waits` or not: something for which it waited
    and that has just ended, else what this process was in, else what the driver was in, else anything."""
    going_on = [event for event in events if event.start < now <= event.end]
    choices = (
        [event for event in going_on if event.end == now and (waits or event.process == process)],
        [event for event in going_on if event.process == process],
        [event for event in going_on if event.process == DRIVER],
        going_on,
    )
    candidates: list[TimelineEvent] = next(filter(None, choices), [])
    return max(candidates, key=lambda event: (event.start, -event.end), default=None)


def _depends(event: TimelineEvent, other: TimelineEvent) -> bool:
    if other.process == event.process:
        return other.start >= event.start and other is not event
    return event.waits


def _cut(event: TimelineEvent, end: float) -> TimelineEvent:
    if event.end <= end:
        return event
    return TimelineEvent(event.name, event.process, event.node, event.start, end, event.life, event.waits)


def _merged(segments: list[Segment]) -> list[Segment]:
    """Neighbours of the same event as one, and pieces too short to see given to what follows them."""
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
