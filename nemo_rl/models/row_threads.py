"""Threads that each compute complete passes over their own rows, for small models on CPUs.

torch divides every operation over threads that wait for each other after it. With a small model that is thousands of
waits per step. If another process takes a core, each wait can take as long as that process's share of the scheduler's
time: a step then takes ten times as long. Here every thread uses operations of one thread, so that the threads wait for
each other once per pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class RowThreads:
    """Threads of this process with one torch thread each. Creating it leaves one torch thread to the calling thread.

    Args:
        num_threads: number of threads, the calling one included.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        # The setting belongs to a thread, except that matrix products by MKL take that of the last call.
        self._pool = ThreadPoolExecutor(num_threads - 1, "rows", initializer=torch.set_num_threads, initargs=(1,))
        torch.set_num_threads(1)

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Apply `function` to at most `num_threads` items at the same time, with the caller's gradient mode.

        Raises:
            Exception: that of the first item that raised, after all have ended.
        """
        assert len(items) <= self.num_threads, "each item takes a thread"
        enabled = torch.is_grad_enabled()

        def run(item: _Item) -> _Result:
            with torch.set_grad_enabled(enabled):
                return function(item)

        others = [self._pool.submit(run, item) for item in items[1:]]
        try:
            first = run(items[0])
        finally:
            errors = [future.exception() for future in others]
        for error in errors:
            if error is not None:
                raise error
        return [first, *(future.result() for future in others)]


def map_rows(threads: RowThreads | None, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Apply `function` to items in threads; without threads, in this one. See `RowThreads.map`."""
    return [function(item) for item in items] if threads is None else threads.map(function, items)
