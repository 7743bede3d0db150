"""A task on its way: with the key that says where it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nemo_rl.pipelines.tasks import Task

# Source number, then the position among its siblings wherever a stage made several tasks of one. Keys are unique,
# sort in the order of the input, and are the same when the work is repeated, on whichever executor.
Key = tuple[int, ...]
T = TypeVar("T")

# Tasks travel in groups: small ones share the cost of a call, large ones go alone.
MAX_GROUP_BYTES = 1 << 20
GROUPS_PER_CPU = 4


@dataclass(slots=True)
class Item:
    """A task and its key."""

    task: Task[Any]
    key: Key


def key_text(key: Key) -> str:
    """A key as text that sorts like it and may stand in a file name."""
    return ".".join([_sortable(key[0], 5), *(_sortable(part, 1) for part in key[1:])])


def _sortable(number: int, num_digits: int) -> str:
    """Digits; where they are more than `num_digits`, after a letter that says how many more."""
    text = f"{number:0{num_digits}d}"
    more = len(text) - num_digits
    return text if not more else chr(ord("a") + more - 1) + text


def child_lineage(parent: Item, child: Key) -> str:
    """A task's `_lineage`: its key as it were if the run had no segments, in which keys start anew.

    So it is the same on every executor, however that one cuts a pipeline into segments.

    Args:
        child: key of what became of `parent`.
    """
    return parent.task._lineage + key_text(child)[len(key_text(parent.key)) :]


def chunks(values: Sequence[T], size: int) -> Iterator[list[T]]:
    """Consecutive parts of at most `size`."""
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


def group_size(num_tasks: int, num_cpus: float, batch_size: int) -> int:
    """How many of `num_tasks` travel together: a few groups per CPU, and whole batches."""
    even = math.ceil(num_tasks / (GROUPS_PER_CPU * max(1.0, num_cpus)))
    return max(1, math.ceil(even / batch_size) * batch_size)


def grouped(batches: Iterable[list[Item]], num_given: int, num_cpus: float) -> Iterator[list[Item]]:
    """Put a stage's output into groups, each no larger than the group that came in, where a stage multiplies tasks.

    Args:
        batches: what each call of the stage gave.
        num_given: tasks in the group that came in.
    """
    group: list[Item] = []
    num_bytes = 0
    for batch in batches:
        limit = max(num_given, group_size(len(batch), num_cpus, 1)) if num_given > 1 else 0
        limit = limit or group_size(len(batch), num_cpus, 1)
        for item in batch:
            group.append(item)
            num_bytes += item.task.num_bytes
            if len(group) >= limit or num_bytes >= MAX_GROUP_BYTES:
                yield group
                group, num_bytes = [], 0
    if group:
        yield group
