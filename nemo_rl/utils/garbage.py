"""Python's garbage collector, kept away from what only ever grows."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Start something up without garbage collection; what there is at the end is never looked at again.

    Imports make millions of objects that stay, and every few hundred of them the collector would walk through those
    that there are: a quarter of the time that importing vLLM takes, a fifth of importing transformers.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        freeze_modules()
    finally:
        if was_enabled:
            gc.enable()


def freeze_modules() -> None:
    """Keep what has been made so far out of garbage collection, but for what nobody uses any more: that goes now.

    Modules live as long as the process: without this each full collection walks through all of them.
    """
    gc.collect()
    gc.freeze()
