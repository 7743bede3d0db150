"""Reduces the cost of Python's garbage collector during imports."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Disable garbage collection in the block, and exclude the objects that exist at its end from later collections.

    Imports create millions of permanent objects, and the collector traverses them again and again. It takes a quarter
    of the time of importing vLLM, and a fifth of importing transformers.
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
    """Collect garbage once, and then exclude all existing objects from later collections.

    Modules live as long as the process. Without freezing, every full collection traverses all of them.
    """
    gc.collect()
    gc.freeze()
