"""End a process when its parent has ended. Needs the standard library only."""

from __future__ import annotations

import os
import threading

_INTERVAL_S = 0.5


def exit_with_parent() -> threading.Event:
    """Start a thread that ends this process when its parent has ended; set the returned event to stop the thread.

    For processes that would otherwise survive: Ray does not end a worker while other threads keep it busy after its
    raylet has died. The process ends with exit code 1, without clean-up.
    """
    stopped = threading.Event()
    parent = os.getppid()

    def watch() -> None:
        while not stopped.wait(_INTERVAL_S):
            if os.getppid() != parent:
                os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
    return stopped
