"""Writing a file so that whoever reads it finds the old content or the new one, never a part."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file beside `path` and rename it, so that a writer that is killed leaves what was there.

    The directory is made where it is missing. Several writers may write at once: one of them wins. Not flushed to the
    disk, so this is no shield against a power failure.

    Args:
        content: text is written as UTF-8, with a question mark for what UTF-8 does not have (lone surrogates).
        private: nobody else may read or write the file, whatever the umask.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    # Hidden, and with another suffix: no listing of finished files takes it for one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    mode = 0o600 if private else 0o666
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
