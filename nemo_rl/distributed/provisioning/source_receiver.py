"""A node's side of the source transfer: compare the driver's source with local files, and unpack it.

A node may have Ray and nothing else, so this module is pickled *by value* and uses the standard library only.

::

    <venv dir>/.source/
      <digest16>/            the files of one source directory; it gets this name when all files are checked
      path/sitecustomize.py  gives precedence to the directories of .source on PYTHONPATH, see `_PATH_HOOK`
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import time
import zipfile
from typing import NamedTuple

HOOK_DIRECTORY = "path"
_UNUSED_S = 30 * 86400.0

# Ray puts the driver's working directory before PYTHONPATH, and this node may have other files in that directory.
_PATH_HOOK = '''\
"""Gives precedence to modules of the source that the driver sent. Written by nemo_rl."""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_sources = os.path.dirname(_here) + os.sep


class SentSource:
    """Finds top-level modules in the directories of PYTHONPATH that the driver sent."""

    paths = [
        path
        for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if path.startswith(_sources) and path != _here
    ]

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, cls.paths) if path is None else None
        return spec if spec is not None and spec.loader is not None else None


sys.meta_path.insert(0, SentSource)
sys.path[:] = [path for path in sys.path if path != _here]
_hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
'''


class FileEntry(NamedTuple):
    """Describes one file of a source directory.

    Attributes:
        path: path relative to the directory, with `/`.
        num_bytes: size of the content.
        sha256: hash of the content; empty if the source is too large to send, in which case only sizes are compared.
        is_executable: whether the owner may execute the file.
        stamp: inode and modification time (ns) on the driver's node; equal on a node that sees the same file.
    """

    path: str
    num_bytes: int
    sha256: str
    is_executable: bool
    stamp: tuple[int, int]


class SourceListing(NamedTuple):
    """Lists the files of one source directory of the driver.

    Attributes:
        root: path of the directory on the driver's node.
        target: path for the files on a node that does not have the same files at `root`.
        files: the files, in the order of the archive.
    """

    root: str
    target: str
    files: tuple[FileEntry, ...]


class Answer(NamedTuple):
    """Holds a node's answer to `check_sources`.

    Attributes:
        not_at_root: for each source, whether its files are not at `root`.
        absent: for each source, whether its files are neither at `root` nor at `target`.
        can_import: whether Ray's Python on this node finds the driver's package without help.
    """

    not_at_root: list[bool]
    absent: list[bool]
    can_import: bool


def check_sources(listings: list[SourceListing], package: str) -> Answer:
    """Check which sources this node has, and whether its Python finds `package`."""
    not_at_root = [not _has_files(listing.root, listing.files) for listing in listings]
    absent = []
    for listing, is_not_at_root in zip(listings, not_at_root):
        absent.append(is_not_at_root and not _has_files(listing.target, listing.files))
        if is_not_at_root and not absent[-1]:
            with contextlib.suppress(OSError):
                os.utime(listing.target)  # the time of the last use
                _write_path_hook(os.path.dirname(listing.target))
    return Answer(not_at_root, absent, importlib.util.find_spec(package) is not None)


def _has_files(root: str, files: tuple[FileEntry, ...]) -> bool:
    try:
        for file in files:
            path = os.path.join(root, file.path)
            status = os.stat(path)
            if status.st_size != file.num_bytes:
                return False
            is_same_file = (status.st_ino, status.st_mtime_ns) == file.stamp
            if not is_same_file and file.sha256 and _sha256(path) != file.sha256:
                return False
    except OSError:
        return False
    return True


def _sha256(path: str) -> str:
    with open(path, "rb") as opened:
        return hashlib.sha256(opened.read()).hexdigest()


def unpack_source(listing: SourceListing, archive: bytes) -> None:
    """Unpack a zip to the listing's `target`.

    Raises:
        ValueError: the archive differs from the listing. Nothing of it remains on disk.
        OSError: `target` is not writable.
    """
    sources, umask = os.path.dirname(listing.target), os.umask(0o022)
    temporary = f"{listing.target}.{os.urandom(4).hex()}.tmp"
    try:
        os.makedirs(sources, exist_ok=True)
        _remove_unused(sources, keep=listing.target)
        _write_path_hook(sources)
        os.mkdir(temporary)
        _unpack(listing.files, archive, temporary)
        _publish(temporary, listing)
    finally:
        os.umask(umask)
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack(files: tuple[FileEntry, ...], archive: bytes, directory: str) -> None:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        if sorted(entry.filename for entry in opened.infolist()) != sorted(file.path for file in files):
            raise ValueError("the files in the archive of the source differ from its listing")
        for file in files:
            if file.path.startswith("/") or "\\" in file.path or not {"", ".", ".."}.isdisjoint(file.path.split("/")):
                raise ValueError(f"a path in the archive of the source would lead out of it: {file.path!r}")
            if opened.getinfo(file.path).file_size != file.num_bytes:
                raise ValueError(f"{file.path} changed while the source was sent. Start the job again.")
            content = opened.read(file.path)
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise ValueError(f"{file.path} changed while the source was sent. Start the job again.")
            path = os.path.join(directory, file.path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            mode = 0o755 if file.is_executable else 0o644
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as target:
                target.write(content)


def _publish(temporary: str, listing: SourceListing) -> None:
    """Rename the directory to `target`. An existing `target` with the same files stays; another is replaced."""
    try:
        os.rename(temporary, listing.target)
    except OSError:
        if _has_files(listing.target, listing.files):
            return
        broken = f"{temporary}.broken.tmp"
        os.rename(listing.target, broken)
        os.rename(temporary, listing.target)
        shutil.rmtree(broken, ignore_errors=True)


def _write_path_hook(sources: str) -> None:
    directory = os.path.join(sources, HOOK_DIRECTORY)
    path = os.path.join(directory, "sitecustomize.py")
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as opened:
        if opened.read() == _PATH_HOOK:
            return
    os.makedirs(directory, exist_ok=True)
    temporary = f"{path}.{os.urandom(4).hex()}.tmp"
    with open(temporary, "w", encoding="utf-8") as target:
        target.write(_PATH_HOOK)
    os.replace(temporary, path)


def _remove_unused(sources: str, keep: str) -> None:
    """Remove sources that no job has used for a month."""
    for entry in list(os.scandir(sources)):
        if entry.path not in (keep, os.path.join(sources, HOOK_DIRECTORY)):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _UNUSED_S:
                    shutil.rmtree(entry.path)
