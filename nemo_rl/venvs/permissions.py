"""Venvs are run by whoever may read them, so nobody but their owner's group may write to them, whatever the umask."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

_OTHERS_MAY_WRITE = 0o002

_lock = threading.Lock()
_depth = 0
_before = 0


@contextlib.contextmanager
def not_writable_by_others() -> Iterator[None]:
    """While any thread is in such a block, what this process and its children create is not writable by others.

    The umask belongs to the process, so the first to enter sets it and the last to leave puts back what was there.
    """
    global _depth, _before
    with _lock:
        if _depth == 0:
            _before = os.umask(0o022)  # the only way to read it; other threads may create files at this moment
            os.umask(_before | _OTHERS_MAY_WRITE)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                os.umask(_before)
