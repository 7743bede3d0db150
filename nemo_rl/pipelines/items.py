"""Pairs each task with a key that records its origin, and groups tasks for transport."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nemo_rl.pipelines.tasks import Task

# The number of the source task, then the position among its siblings for each stage that turned one task into several.
# Keys are unique, sort in the order of the input, and are the same when work is repeated, on every executor.
Key = tuple[int, ...]
T = TypeVar("T")

# Tasks are sent in groups: small tasks share the cost of a call, large tasks are sent alone.
MAX_GROUP_BYTES = 1 << 20
GROUPS_PER_CPU = 4


@dataclass(slots=True)
class Item:
    """A task and its key."""

    task: Task[Any]
    key: Key


def key_text(key: Key) -> str:
    """Format a key as text that sorts like the key and is valid in a file name."""
    return ".".join([_sortable(key[0], 5), *(_sortable(part, 1) for part in key[1:])])


def _sortable(number: int, num_digits: int) -> str:
    """Format a number with `num_digits` digits. Longer numbers start with a letter that encodes the extra digits."""
    text = f"{number:0{num_digits}d}"
    more = len(text) - num_digits
    return text if not more else chr(ord("a") + more - 1) + text


def child_lineage(parent: Item, child: Key) -> str:
    """Return a task's `_lineage`: the key that it would have in a run with a single segment.

    Keys restart in every segment. The lineage does not, so it is the same on every executor.

    Args:
        parent: the input of the stage.
        child: key of a task that the stage returned for `parent`.
    """
    return parent.task._lineage + key_text(child)[len(key_text(parent.key)) :]


def chunks(values: Sequence[T], size: int) -> Iterator[list[T]]:
    """Split values into consecutive lists of at most `size`."""
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


def group_size(num_tasks: int, num_cpus: float, batch_size: int) -> int:
    """Return the number of tasks per group, so that there are a few groups per CPU, each of whole batches."""
    even = math.ceil(num_tasks / (GROUPS_PER_CPU * max(1.0, num_cpus)))
    return max(1, math.ceil(even / batch_size) * batch_size)


def grouped(batches: Iterable[list[Item]], num_given: int, num_cpus: float) -> Iterator[list[Item]]:
    """Put a stage's output into groups. If a stage multiplies tasks, groups do not become larger than the input group.

    Args:
        batches: the output of each call of the stage.
        num_given: number of tasks in the input group.
        num_cpus: CPUs of the cluster.
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
