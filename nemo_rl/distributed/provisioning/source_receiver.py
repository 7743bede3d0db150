"""What happens on a node where the driver's source is looked for, or arrives.

Such a node may have nothing but Ray: this module is pickled *by value*, and uses the standard library only.

::

    <venv dir>/.source/
      <digest16>/            the files of one source directory; renamed to this when all of them were checked
      path/sitecustomize.py  lets the directories of .source that are on PYTHONPATH win, see `_PATH_HOOK`
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

# Ray puts the driver's working directory before PYTHONPATH, and this node may have other files there.
_PATH_HOOK = '''\
"""Modules of the source that the driver sent are found before any others. Written by nemo_rl."""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_sources = os.path.dirname(_here) + os.sep


class SentSource:
    """Finds top-level modules in the directories of PYTHONPATH that came with the driver."""

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
    """One file of a source directory.

    Attributes:
        path: below the directory, with `/`.
        num_bytes, sha256: of its content; no hash, and sizes decide, in a source that is too large to be sent.
        is_executable: whether its owner may run it.
        stamp: inode and time of its last change where the driver sees it: equal where it is the very same file.
    """

    path: str
    num_bytes: int
    sha256: str
    is_executable: bool
    stamp: tuple[int, int]


class SourceListing(NamedTuple):
    """The files of one source directory, as the driver has them.

    Attributes:
        root: where they are for the driver.
        target: where they are put on a node that has not the same ones at `root`.
        files: in the order of the archive.
    """

    root: str
    target: str
    files: tuple[FileEntry, ...]


class Answer(NamedTuple):
    """What a node says of the sources that it was asked for.

    Attributes:
        lacking: for each, whether it is not at `root`. absent: whether it is not at `target` either.
        can_import: whether the Python that Ray runs with on this node finds the driver's package by itself.
    """

    lacking: list[bool]
    absent: list[bool]
    can_import: bool


def missing_here(listings: list[SourceListing], package: str) -> Answer:
    """Compare this node with the driver."""
    lacking = [not _is_same(listing.root, listing.files) for listing in listings]
    absent = []
    for listing, is_lacking in zip(listings, lacking):
        absent.append(is_lacking and not _is_same(listing.target, listing.files))
        if is_lacking and not absent[-1]:
            with contextlib.suppress(OSError):
                os.utime(listing.target)  # it is in use
                _write_path_hook(os.path.dirname(listing.target))
    return Answer(lacking, absent, importlib.util.find_spec(package) is not None)


def _is_same(root: str, files: tuple[FileEntry, ...]) -> bool:
    try:
        for file in files:
            path = os.path.join(root, file.path)
            found = os.stat(path)
            if found.st_size != file.num_bytes:
                return False
            is_very_same = (found.st_ino, found.st_mtime_ns) == file.stamp
            if not is_very_same and file.sha256 and _sha256_of(path) != file.sha256:
                return False
    except OSError:
        return False
    return True


def _sha256_of(path: str) -> str:
    with open(path, "rb") as opened:
        return hashlib.sha256(opened.read()).hexdigest()


def unpack_here(listing: SourceListing, archive: bytes) -> None:
    """Put the files of a zip at the listing's `target`.

    Raises:
        ValueError: the archive does not hold exactly what the listing says; nothing of it stays.
        OSError: this node cannot write there.
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
            raise ValueError("the archive of the source holds other files than its listing")
        for file in files:
            if file.path.startswith("/") or "\\" in file.path or not {"", ".", ".."}.isdisjoint(file.path.split("/")):
                raise ValueError(f"the archive of the source holds a file that would lead out of it: {file.path!r}")
            if opened.getinfo(file.path).file_size != file.num_bytes:
                raise ValueError(f"{file.path} changed while the source was sent; start the job again")
            content = opened.read(file.path)
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise ValueError(f"{file.path} changed while the source was sent; start the job again")
            path = os.path.join(directory, file.path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            mode = 0o755 if file.is_executable else 0o644
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as target:
                target.write(content)


def _publish(temporary: str, listing: SourceListing) -> None:
    """Rename; what is there already stays if it is right (another job was quicker), else it is replaced."""
    try:
        os.rename(temporary, listing.target)
    except OSError:
        if _is_same(listing.target, listing.files):
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
    """Sources that no job has asked for in a month."""
    for entry in list(os.scandir(sources)):
        if entry.path not in (keep, os.path.join(sources, HOOK_DIRECTORY)):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _UNUSED_S:
                    shutil.rmtree(entry.path)
