"""Tells a worker whether the code that it has imported is still the code on disk."""

from __future__ import annotations

import os
import sys

# A file's times are those of the kernel's clock tick, which may be a few milliseconds before the call that wrote it.
_CLOCK_TICK_S = 0.02

_Facts = tuple[int, int, int, int]


class LoadedCode:
    """Records the files of all modules that this process has imported.

    Args:
        since: Unix time before the first import of code that may be edited. A file that changed later may have been
            changed after its import, so its state at the import is unknown.
    """

    def __init__(self, since: float) -> None:
        self._since_ns = int((since - _CLOCK_TICK_S) * 1e9)
        self._files: dict[str, _Facts] = {}

    def record(self) -> bool:
        """Add the modules that were imported since the last call.

        Returns:
            False if the state of some file when it was imported is unknown.
        """
        for path in _module_files():
            if path in self._files:
                continue
            facts = _facts(path)
            if facts is None or facts[0] >= self._since_ns:
                return False
            self._files[path] = facts
        return True

    def is_current(self) -> bool:
        """Return whether no recorded file has been changed, replaced or deleted."""
        return all(_facts(path) == facts for path, facts in self._files.items())


def _module_files() -> set[str]:
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return {file for file in files if isinstance(file, str)}


def _facts(path: str) -> _Facts | None:
    """Return what identifies the content of a file; None if it cannot be read, such as a module in an archive.

    A user can set the time of the last modification to any value, but not the time of the last change. The latter also
    changes with the number of links, which other venvs with the same package add and remove; such files are never
    edited in place.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    changed_ns = status.st_ctime_ns if status.st_nlink == 1 else status.st_mtime_ns
    return changed_ns, status.st_mtime_ns, status.st_size, status.st_ino
