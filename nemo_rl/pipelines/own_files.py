"""Files that are unpickled: unpickling runs what the writer of a file wants, so nobody else may have written them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from nemo_rl.errors import PipelineError

_ROOT = 0


def open_own(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file that only this user, or root, can have written.

    Raises:
        PipelineError: another user owns it, or may write to it.
        OSError: it cannot be opened.
    """
    file = open(path, "rb")  # noqa: SIM115
    status = os.fstat(file.fileno())  # of the very file that is read, not of whatever is there by then
    if status.st_uid in (os.geteuid(), _ROOT) and not status.st_mode & 0o022:
        return file
    file.close()
    whose = f"belongs to user {status.st_uid}" if status.st_uid != os.geteuid() else "can be written by others"
    raise PipelineError(
        f"{path} {whose} (mode {status.st_mode & 0o777:o}), and reading it runs code that is in it. If you trust all "
        "who may have written it, make it yours alone: chown and `chmod go-w`, or copy it."
    )


def read_own(path: Path) -> bytes:
    """The content of a file that only this user, or root, can have written. Raises as `open_own` does."""
    with open_own(path) as file:
        return file.read()


def append_own(path: Path) -> IO[bytes]:
    """Open a file for appending, unbuffered, which nobody else may read or write when it is made here."""
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))
