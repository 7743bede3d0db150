"""Stages for the tests. Workers import them through the driver's search path."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from nemo_rl.pipelines import DocumentBatch, GatherStage, ProcessingStage, Resources

TINY = Resources(cpus=0.5)


def batches(num_batches: int, rows: int = 2) -> list[DocumentBatch]:
    """Return batches whose `number` column counts continuously."""
    return [
        DocumentBatch(f"b{i}", "numbers", pd.DataFrame({"number": range(i * rows, (i + 1) * rows)}))
        for i in range(num_batches)
    ]


def numbers(tasks: Sequence[Any]) -> list[int]:
    """Return all values of `number`, in order."""
    return [int(value) for task in tasks for value in task.to_pandas()["number"]]


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Limit the size of the files of this process to `num_bytes`. A longer write is truncated."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class AddOne(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds one to `number`, in place."""

    resources = TINY

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], ["number"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        task.data["number"] += 1
        return task


class SplitRows(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Returns one task per row, and drops a batch whose first number is divisible by `drop_divisor`."""

    resources = TINY
    drop_divisor = 0

    def process(self, task: DocumentBatch) -> list[DocumentBatch] | None:
        frame = task.to_pandas()
        if self.drop_divisor and frame["number"][0] % self.drop_divisor == 0:
            return None
        return [task.with_data(frame[i : i + 1]) for i in range(len(frame))]


class PackagingVersion(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds its version of `packaging` and its Python as columns named after the stage."""

    resources = TINY

    def setup(self) -> None:
        import packaging

        self.version = packaging.__version__

    def process(self, task: DocumentBatch) -> DocumentBatch:
        import importlib.metadata
        import sys

        assert importlib.metadata.version("packaging") == self.version
        return task.with_data(task.to_pandas().assign(**{self.name: self.version, f"{self.name} python": sys.prefix}))


class Failing(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Raises for batches with a number in `bad`. If `num_times` is not 0, only the first `num_times` times."""

    resources = TINY

    def __init__(self, bad: Sequence[int], num_times: int = 0) -> None:
        self.bad = list(bad)
        self.num_times = num_times
        self._seen = 0

    def process(self, task: DocumentBatch) -> DocumentBatch:
        matches = set(self.bad) & set(task.to_pandas()["number"])
        if matches:
            self._seen += 1
            task.data["number"] = -1  # must reach neither a retry nor failed/
            if not self.num_times or self._seen <= self.num_times:
                raise ValueError(f"cannot take {min(matches)}")
        return task


class KillsWorker(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Kills its process on batches with the number `bad`, the first `num_times` times."""

    resources = TINY

    def __init__(self, bad: int, folder: str, num_times: int) -> None:
        self.bad = bad
        self.folder = folder
        self.num_times = num_times

    def process(self, task: DocumentBatch) -> DocumentBatch:
        if self.bad in set(task.to_pandas()["number"]):
            deaths = len(list(Path(self.folder).iterdir()))
            if deaths < self.num_times:
                Path(self.folder, f"death-{deaths}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return task


class Slow(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Creates a file per batch, and then sleeps."""

    resources = TINY

    def __init__(self, folder: str, seconds: float) -> None:
        self.folder = folder
        self._seconds = seconds

    def process(self, task: DocumentBatch) -> DocumentBatch:
        Path(self.folder, f"{task._lineage}-{time.time_ns()}").touch()
        time.sleep(self._seconds)
        return task


class KeepFirstOfEach(GatherStage[DocumentBatch, DocumentBatch]):
    """Keeps the first row of every value of `number` modulo `modulus`, over all tasks."""

    resources = TINY

    def __init__(self, modulus: int) -> None:
        self.modulus = modulus

    def process_all(self, tasks: Sequence[DocumentBatch]) -> Any:
        seen: set[int] = set()
        for task in tasks:
            frame = task.to_pandas()
            keep = []
            for number in frame["number"]:
                keep.append(number % self.modulus not in seen)
                seen.add(number % self.modulus)
            if any(keep):
                yield task.with_data(frame[keep])
