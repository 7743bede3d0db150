"""Starts a stage's worker before this package can be imported in its process. Always pickled by value.

The worker finds the driver's own modules through the driver's search path. Its entries are appended to `sys.path`, so
they cannot hide a package of the stage's venv. (Ray passes on only the directory of the driver's script.) At the top,
this module imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def extend_search_path(entries: list[str]) -> None:
    """Append the entries that `sys.path` does not have yet."""
    sys.path += [entry for entry in entries if entry not in sys.path]


def threads_are_set() -> bool:
    """Return whether the user has set the number of OpenMP threads. Ray sets it after the start of a process."""
    with contextlib.suppress(OSError):
        return b"OMP_NUM_THREADS=" in Path("/proc/self/environ").read_bytes()
    return True


class StageWorker:
    """Runs one stage. The actor pool uses it as a Ray actor; the other executors wrap it.

    An actor pool may keep a worker for a later run. `finish` ends one run, and `restart` begins the next one.

    Args:
        payload: the pickled `StageJob`.
        search_path: entries that are appended to `sys.path`.
        env_vars: variables to set.
        num_threads: number of OpenMP threads; None leaves it to Ray.
    """

    def __init__(
        self, payload: bytes, search_path: list[str], env_vars: dict[str, str], num_threads: int | None = None
    ) -> None:
        self._began = time.monotonic()
        since = time.time()
        extend_search_path(search_path)
        from nemo_rl import settings

        # Ray's own number is 1 for an actor without CPUs.
        threads = {} if num_threads is None or threads_are_set() else {"OMP_NUM_THREADS": str(num_threads)}
        settings.export(threads | env_vars)
        from ray import cloudpickle

        from nemo_rl.pipelines.loaded_code import LoadedCode
        from nemo_rl.pipelines.runner import StageRunner

        self._code = LoadedCode(since)
        self._runner: Any = StageRunner(cloudpickle.loads(payload))

    def start(self) -> float:
        """Set the stage up. Returns the seconds since this object was created, including imports."""
        self._runner.start()
        self._surroundings = self._seen_surroundings()
        return time.monotonic() - self._began

    def finish(self) -> bool:
        """Tear the stage down and forget it. Returns whether this process may run the same stage again."""
        self._runner.close()
        self._runner = None
        gc.collect()  # a stage and its runner refer to each other
        return self._code.record() and self._surroundings == self._seen_surroundings()

    def restart(self, payload: bytes) -> float | None:
        """Set up an equal stage for another run, in the process of the last one.

        Returns:
            Seconds; None if a file that this process has imported has changed, or the stage cannot be set up again.
        """
        self._began = time.monotonic()
        if not self._code.is_current():
            return None
        from ray import cloudpickle

        from nemo_rl.pipelines.runner import StageRunner

        self._runner = StageRunner(cloudpickle.loads(payload))
        try:
            self._runner.start()
        except Exception:  # a new process may do better
            self._runner.withdraw_stop()
            return None
        return time.monotonic() - self._began

    def _seen_surroundings(self) -> tuple[str, dict[str, str]]:
        from nemo_rl import settings

        return os.getcwd(), settings.snapshot()

    def run(self, *groups: list[Any]) -> Iterator[Any]:
        """Process the tasks of `groups`. Yields groups of results, then a list with the number of tasks in each."""
        sizes = []
        for output in self._runner.run([item for group in groups for item in group]):
            sizes.append(len(output))
            yield output
        yield sizes

    def run_each(self, groups: Iterator[list[Any]]) -> Iterator[list[Any]]:
        """Process groups of tasks one by one. Yields groups of results."""
        for group in groups:
            yield from self._runner.run(group)

    def gather(self, num_sources: int) -> int:
        """See `StageRunner.gather`."""
        return self._runner.gather(num_sources)

    def close(self) -> None:
        """Tear the stage down and end this process."""
        import ray

        self._runner.close()
        ray.actor.exit_actor()


class DataStage:
    """Runs stages as a callable class for Ray Data. Each row of a batch holds a pickled group of tasks.

    Args:
        constructor_arguments: those of the `StageWorker` of each stage. Every group passes through all stages in order.
    """

    def __init__(self, *constructor_arguments: tuple[bytes, list[str], dict[str, str]]) -> None:
        self._workers: list[StageWorker] = []
        self._failed_start: Exception | None = None
        try:
            for arguments in constructor_arguments:
                worker = StageWorker(*arguments)
                worker.start()
                self._workers.append(worker)
        except Exception as error:
            # Raised in __call__: an error in the constructor would reach the driver as text, behind an actor death.
            self._failed_start = error

    def __call__(self, batch: Any) -> Iterator[Any]:
        import pyarrow
        from ray import cloudpickle

        if self._failed_start is not None:
            raise self._failed_start
        groups = [cloudpickle.loads(value.as_buffer()) for value in batch.column("group")]
        outputs = iter([[item for group in groups for item in group]])
        for worker in self._workers:
            outputs = worker.run_each(outputs)
        for output in outputs:
            row = pyarrow.array([cloudpickle.dumps(output)], pyarrow.large_binary())
            yield pyarrow.table({"group": row})

    def __del__(self) -> None:
        for worker in self.__dict__.get("_workers", ()):
            worker._runner.close()
