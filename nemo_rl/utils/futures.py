"""Futures that are not those of an executor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

ResultT = TypeVar("ResultT")


def completed(value: ResultT) -> Future[ResultT]:
    """Return a future that already holds `value`."""
    future: Future[ResultT] = Future()
    future.set_result(value)
    return future


def run_in_thread(function: Callable[[], ResultT], name: str) -> Future[ResultT]:
    """Call `function` in a daemon thread and return the future of its result or exception.

    Unlike an executor's thread, the thread does not keep the process alive, so Ctrl-C does not wait for it. The call
    has started when this returns, so the future cannot be cancelled.
    """
    future: Future[ResultT] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # every error belongs to the caller of `result()`
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
