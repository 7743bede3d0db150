"""Opens files that are unpickled. Unpickling can run any code, so no other user may have written the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from nemo_rl.errors import PipelineError

_ROOT = 0


def open_trusted(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading that only this user or root can have written.

    Raises:
        PipelineError: another user owns the file or may write to it.
        OSError: the file cannot be opened.
    """
    file = open(path, "rb")  # noqa: SIM115
    status = os.fstat(file.fileno())  # of the open file: the path may be replaced meanwhile
    if status.st_uid in (os.geteuid(), _ROOT) and not status.st_mode & 0o022:
        return file
    file.close()
    reason = f"belongs to user {status.st_uid}" if status.st_uid != os.geteuid() else "can be written by others"
    raise PipelineError(
        f"{path} {reason} (mode {status.st_mode & 0o777:o}), and reading it can run code that it contains. If you "
        "trust every user who may have written it, use chown and `chmod go-w`, or copy the file."
    )


def read_trusted(path: Path) -> bytes:
    """Read a file that only this user or root can have written. Raises the same errors as `open_trusted`."""
    with open_trusted(path) as file:
        return file.read()


def append_private(path: Path) -> IO[bytes]:
    """Open a file for unbuffered appending. A new file can be read and written by this user only."""
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))
