"""Files that other processes read: written atomically, or in a directory that no other user can write."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, private: bool = False, durable: bool = True) -> None:
    """Write a temporary file in the directory of `path` and rename it to `path`.

    If the writer is killed or the power fails, the old content remains. Several processes may write at the same time;
    the last rename wins.

    Args:
        path: the file. Missing directories are created.
        content: text is written as UTF-8. Lone surrogates are replaced by question marks.
        private: allow only this user to read and write the file, regardless of the umask.
        durable: wait until the file and its name are on disk, which takes milliseconds. False is for files that are
            written many times a second. A power failure may leave them empty or full of zeros, and readers must allow
            for that.

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
            if durable:
                # Otherwise the new name may reach the disk before the content.
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_tree(path: Path) -> None:
    """Wait until every file and directory below `path`, and `path` itself, are on disk."""
    for directory, _, files in os.walk(path):
        for name in files:
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(directory))


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk, as far as its file system supports that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
