"""Files that other processes read: written atomically, or in a directory that no other user can write."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a temporary file in the directory of `path` and rename it to `path`.

    If the writer is killed, the old content remains. Several processes may write at the same time; the last rename
    wins. The file is not flushed to disk, so a power failure may lose it.

    Args:
        path: the file. Missing directories are created.
        content: text is written as UTF-8. Lone surrogates are replaced by question marks.
        private: allow only this user to read and write the file, regardless of the umask.

    Raises:
        OSError: the file cannot be written. The temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    # Hidden, with another suffix, so that listings of finished files skip it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    mode = 0o600 if private else 0o666
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def private_temp_dir() -> Path:
    """Return a directory of this user in the temporary directory, which no other user can read or write.

    Raises:
        PermissionError: it exists, and belongs to another user or is open to others.
    """
    directory = Path(tempfile.gettempdir()) / f"nemo_rl-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} is writable by other users, so its files cannot be trusted. Remove it.")
    return directory
