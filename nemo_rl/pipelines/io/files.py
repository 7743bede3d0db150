"""Lists, opens and atomically writes files, given by path or fsspec URL."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from nemo_rl.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}
TEMPORARY_PREFIX = "_writing-"
_PATTERN = "*?["


@dataclass(frozen=True)
class FileInfo:
    """Describes a file: path or URL, size in bytes, and a version that changes when the file is rewritten."""

    url: str
    size: int
    version: str


def parse_size(size: int | str) -> int:
    """Return a number of bytes, given as a number or as text such as "64MiB". Raises `DataError` for other values."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = str(size).strip().lower()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), None)
    number = text.removesuffix(unit or "").strip()
    if unit is None or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise DataError(f"{size!r} is not a size: expected a number of bytes or text such as '64MiB'")
    return int(float(number) * _UNITS[unit])


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path in it. Raises `DataError` for unknown protocols."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(os.path.expanduser(url))
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error


def list_files(urls: Sequence[str], suffixes: Sequence[str]) -> list[FileInfo]:
    """List the files of paths, directories and glob patterns in a fixed order, each file once.

    In a directory, only files with one of `suffixes` are listed, compressed or not. Files and directories whose names
    start with a dot or an underscore (such as `_SUCCESS`) are skipped, unless a path or a part of a pattern starts with
    the same character.

    Raises:
        DataError: a path does not exist or cannot be read, or there are no files.
    """
    infos: dict[str, FileInfo] = {}
    for url in urls:
        files, path = file_system(url)
        try:
            listed = _listed(files, path, url, suffixes)
        except OSError as error:
            raise DataError(f"{url} cannot be listed: {error}") from error
        infos.update((info.url, info) for info in listed)
    if not infos:
        raise DataError(f"there are no files ({', '.join(suffixes)}) in {', '.join(urls)}")
    return list(infos.values())


def would_list(url: str, suffixes: Sequence[str], place: str) -> bool:
    """Return whether `list_files([url], suffixes)` would list the file at the canonical path `place` if it existed."""
    import fsspec.utils

    start, pattern = split_glob(url)
    root = canonical_path(start)
    if not pattern:
        return place == root or (is_below(place, root) and _is_data(place, root, suffixes))
    translated = fsspec.utils.glob_translate(f"{root.rstrip('/')}/{pattern}")
    return re.fullmatch(translated, place) is not None and not _is_hidden(place, root, pattern)


def split_glob(url: str) -> tuple[str, str]:
    """Split a glob pattern into its fixed directory and the rest. A plain path gives the path and ""."""
    position = min((url.index(character) for character in _PATTERN if character in url), default=-1)
    if position < 0:
        return url, ""
    head, slash, _ = url[:position].rpartition("/")
    return head + slash or ".", url[len(head + slash) :]


def canonical_path(url: str) -> str:
    """Return the real path of a local file or directory, or its full URL, so that different spellings compare equal."""
    files, path = file_system(url)
    return os.path.realpath(path) if _is_local(files) else str(files.unstrip_protocol(path)).rstrip("/")


def is_below(place: str, root: str) -> bool:
    """Return whether `place` is below the directory `root`. Both are canonical paths."""
    return place.startswith(root.rstrip("/") + "/")


def _listed(files: Any, path: str, url: str, suffixes: Sequence[str]) -> list[FileInfo]:
    if any(character in path for character in _PATTERN):
        root, pattern = split_glob(path)
        infos = {p: i for p, i in files.glob(path, detail=True).items() if not _is_hidden(p, root, pattern)}
    elif not files.exists(path):
        raise DataError(f"{url} does not exist")
    elif files.isdir(path):
        infos = {p: i for p, i in files.find(path, detail=True).items() if _is_data(p, path, suffixes)}
    else:
        infos = {path: files.info(path)}
    return [_info(files, infos[name]) for name in sorted(infos) if infos[name].get("type", "file") == "file"]


def _is_data(path: str, root: str, suffixes: Sequence[str]) -> bool:
    return plain_name(path).endswith(tuple(suffixes)) and not _is_hidden(path, root)


def _is_hidden(path: str, root: str, pattern: str = "") -> bool:
    """Return whether a name below `root` starts with a dot or an underscore, and no part of the pattern does."""
    requested = {part[0] for part in PurePosixPath(pattern).parts}
    parts = PurePosixPath(path[len(root) :].lstrip("/")).parts
    return any(part.startswith((".", "_")) and part[0] not in requested for part in parts)


def _info(files: Any, info: dict[str, Any]) -> FileInfo:
    version = next((str(info[key]) for key in ("ETag", "etag", "mtime", "created", "LastModified") if key in info), "")
    url = info["name"] if _is_local(files) else files.unstrip_protocol(info["name"])
    return FileInfo(url, int(info.get("size") or 0), version)


def _is_local(files: Any) -> bool:
    return "file" in _protocols(files)


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


def is_in_process(url: str) -> bool:
    """Return whether a URL refers to the memory of the current process, as fsspec's `memory://` does."""
    files, _ = file_system(url)
    return "memory" in _protocols(files)


def plain_name(path: str) -> str:
    """Return the path in lower case, without a compression suffix."""
    lowered = path.lower()
    for suffix in COMPRESSED_SUFFIXES:
        lowered = lowered.removesuffix(suffix)
    return lowered


def is_compressed(path: str) -> bool:
    """Return whether the file name has a compression suffix."""
    return path.lower().endswith(COMPRESSED_SUFFIXES)


@contextlib.contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, and decompress it according to its suffix.

    Raises:
        DataError: the file cannot be opened, or an error occurs while the block reads it.
    """
    files, path = file_system(url)
    try:
        with files.open(path, "rb") as raw, _decompressed(raw, url) as stream:
            yield stream
    except _READ_ERRORS as error:
        raise DataError(f"{url} cannot be read: {str(error) or type(error).__name__}") from error


def _decompressed(raw: Any, url: str) -> Any:
    suffix = PurePosixPath(url.lower()).suffix
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".bz2":
        return bz2.open(raw)
    if suffix == ".xz":
        return lzma.open(raw)
    if suffix == ".zst":
        import pyarrow

        # CompressedInputStream cannot read lines.
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return contextlib.nullcontext(raw)


def write_file(url: str, content: Any) -> None:
    """Write or replace a file atomically.

    A local file is written under another name and renamed. Elsewhere it is one upload, which object stores make visible
    when it is complete.

    Raises:
        DataError: the file cannot be written.
    """
    files, path = file_system(url)
    try:
        if not _is_local(files):
            files.pipe_file(path, bytes(content))
            return
        temporary = os.path.join(os.path.dirname(path), f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise DataError(f"{url} cannot be written: {error}") from error


def prepare_directory(url: str, resumes: bool, overwrite: bool) -> None:
    """Create an output directory, and check that it is writable and empty.

    A resumed run may find files in it. `overwrite` deletes them if the run is not resumed.

    Raises:
        DataError: the directory is not empty or cannot be written.
    """
    files, path = file_system(url)
    try:
        files.makedirs(path, exist_ok=True)
        names = [name for name in files.ls(path, detail=False) if not PurePosixPath(name).name.startswith(".")]
        for name in [n for n in names if resumes and PurePosixPath(n).name.startswith(TEMPORARY_PREFIX)]:
            # Left by a writer that was killed. A writer whose driver was killed may rename the file at this moment.
            with contextlib.suppress(FileNotFoundError):
                files.rm(name)
        if overwrite and not resumes:
            for name in names:
                files.rm(name, recursive=True)
        elif names and not resumes:
            raise DataError(f"the output directory {url} is not empty; choose another one, or set overwrite=True")
        _probe(files, path)
    except OSError as error:
        raise DataError(f"the output directory {url} cannot be written: {error}") from error


def prepare_file(url: str) -> None:
    """Check that a file can be written or replaced. Removes temporary files of writers that were killed.

    Raises:
        DataError: the file cannot be written, or the path is a directory.
    """
    files, path = file_system(url)
    try:
        files.makedirs(os.path.dirname(path), exist_ok=True)
        if files.isdir(path):
            raise DataError(f"{url} is a directory; name a file")
        remove_temporaries(url)
        _probe(files, os.path.dirname(path))
    except OSError as error:
        raise DataError(f"{url} cannot be written: {error}") from error


def temporary_name(path: str) -> str:
    """Return a temporary name in the directory of `path`, for a file that is renamed to `path` when it is complete."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex}"


def remove_temporaries(url: str) -> None:
    """Remove all files with a `temporary_name` of this file."""
    files, path = file_system(url)
    prefix = temporary_name(path).rpartition("-")[0] + "-"
    for name in files.ls(os.path.dirname(path), detail=False):
        if str(name).startswith(prefix) and "-" not in str(name)[len(prefix) :]:
            files.rm(name)


def _probe(files: Any, directory: str) -> None:
    """Check that a directory is writable: create and remove a file. Raises `OSError` if that fails."""
    probe = temporary_name(f"{directory.rstrip('/')}/probe")
    files.pipe_file(probe, b"")
    files.rm(probe)
