"""One event loop per process, in a thread of its own, in which the coroutines of all tools run."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from typing import Any


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process; start it if it does not run."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="tools: coroutines", daemon=True).start()
    return loop


def completed(value: Any) -> Any:
    """Return `value`, or the result of a coroutine. Not to be called from a coroutine."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return asyncio.run_coroutine_threadsafe(wait(), event_loop()).result()
