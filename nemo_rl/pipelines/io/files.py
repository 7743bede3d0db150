"""Files by path or fsspec URL: listing, opening, and writing so that a file is whole or not there."""

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
    """A file: path or URL, bytes, and what changes when it is written again."""

    url: str
    size: int
    version: str


def num_bytes(size: int | str) -> int:
    """`67108864` or "64MiB". Raises `DataError`."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = str(size).strip().lower()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), None)
    number = text.removesuffix(unit or "").strip()
    if unit is None or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise DataError(f"{size!r} is no size: expected a number of bytes or text such as '64MiB'")
    return int(float(number) * _UNITS[unit])


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path in it. Raises `DataError` for an unknown protocol."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(os.path.expanduser(url))
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error


def list_files(urls: Sequence[str], suffixes: Sequence[str]) -> list[FileInfo]:
    """The files that paths, directories and patterns name, in a fixed order, each once.

    Below a directory only files with one of `suffixes` count (also compressed). Files and directories whose name starts
    with a dot or an underscore (`_SUCCESS`) count only where a path, or a part of a pattern, starts so itself.

    Raises:
        DataError: a path that does not exist or cannot be read, or no files at all.
    """
    found: dict[str, FileInfo] = {}
    for url in urls:
        files, path = file_system(url)
        try:
            listed = _listed(files, path, url, suffixes)
        except OSError as error:
            raise DataError(f"{url} cannot be listed: {error}") from error
        found.update((info.url, info) for info in listed)
    if not found:
        raise DataError(f"there are no files ({', '.join(suffixes)}) in {', '.join(urls)}")
    return list(found.values())


def would_list(url: str, suffixes: Sequence[str], place: str) -> bool:
    """Whether `list_files([url], suffixes)` would give the file at `place` (of `place_of`) if it were there."""
    import fsspec.utils

    start, pattern = fixed_root(url)
    root = place_of(start)
    if not pattern:
        return place == root or (is_below(place, root) and _is_data(place, root, suffixes))
    translated = fsspec.utils.glob_translate(f"{root.rstrip('/')}/{pattern}")
    return re.fullmatch(translated, place) is not None and not _is_hidden(place, root, pattern)


def fixed_root(url: str) -> tuple[str, str]:
    """A path and "", or the directory below which a pattern finds files and the pattern from there on."""
    position = min((url.index(character) for character in _PATTERN if character in url), default=-1)
    if position < 0:
        return url, ""
    head, slash, _ = url[:position].rpartition("/")
    return head + slash or ".", url[len(head + slash) :]


def place_of(url: str) -> str:
    """One name for each file or directory, however it is spelled."""
    files, path = file_system(url)
    return os.path.realpath(path) if _is_local(files) else str(files.unstrip_protocol(path)).rstrip("/")


def is_below(place: str, root: str) -> bool:
    """Whether `place` is somewhere in the directory `root`; both of `place_of`."""
    return place.startswith(root.rstrip("/") + "/")


def _listed(files: Any, path: str, url: str, suffixes: Sequence[str]) -> list[FileInfo]:
    if any(character in path for character in _PATTERN):
        root, pattern = fixed_root(path)
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
    """Whether something below `root` starts with a dot or an underscore and no part of the pattern does."""
    asked_for = {part[0] for part in PurePosixPath(pattern).parts}
    parts = PurePosixPath(path[len(root) :].lstrip("/")).parts
    return any(part.startswith((".", "_")) and part[0] not in asked_for for part in parts)


def _info(files: Any, info: dict[str, Any]) -> FileInfo:
    version = next((str(info[key]) for key in ("ETag", "etag", "mtime", "created", "LastModified") if key in info), "")
    url = info["name"] if _is_local(files) else files.unstrip_protocol(info["name"])
    return FileInfo(url, int(info.get("size") or 0), version)


def _is_local(files: Any) -> bool:
    return "file" in _protocols(files)


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


def is_in_process(url: str) -> bool:
    """Whether each process has files of its own there: fsspec's `memory://`."""
    files, _ = file_system(url)
    return "memory" in _protocols(files)


def plain_name(path: str) -> str:
    """The path in lower case without the suffix of a compression."""
    lowered = path.lower()
    for suffix in COMPRESSED_SUFFIXES:
        lowered = lowered.removesuffix(suffix)
    return lowered


def is_compressed(path: str) -> bool:
    """Whether the name says so."""
    return path.lower().endswith(COMPRESSED_SUFFIXES)


@contextlib.contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed by its name. Raises `DataError`, also for what goes wrong while it is read."""
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

        # It reads no lines by itself.
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return contextlib.nullcontext(raw)


def write_whole(url: str, content: Any) -> None:
    """Write a file that is whole or not there, replacing what has its name.

    On a local disk by renaming; elsewhere in one upload, which object stores make visible at its end.

    Raises:
        DataError: it cannot be written.
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
    """Make sure that a directory exists, can be written, and is empty unless a run resumes or `overwrite` is given.

    Raises:
        DataError: otherwise.
    """
    files, path = file_system(url)
    try:
        files.makedirs(path, exist_ok=True)
        there = [name for name in files.ls(path, detail=False) if not PurePosixPath(name).name.startswith(".")]
        for name in [n for n in there if resumes and PurePosixPath(n).name.startswith(TEMPORARY_PREFIX)]:
            # Of a writer that was killed; one whose driver was killed may still be about to rename it.
            with contextlib.suppress(FileNotFoundError):
                files.rm(name)
        if overwrite and not resumes:
            for name in there:
                files.rm(name, recursive=True)
        elif there and not resumes:
            raise DataError(f"the output directory {url} is not empty; choose another, or give overwrite=True")
        _probe(files, path)
    except OSError as error:
        raise DataError(f"the output directory {url} cannot be written: {error}") from error


def prepare_file(url: str) -> None:
    """Make sure that a file can be written, or replaced; what a writer of it that was killed left behind is removed.

    Raises:
        DataError: it cannot, or it is a directory.
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


def temporary_of(path: str) -> str:
    """A name next to a file, for what becomes that file once it is whole."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex}"


def remove_temporaries(url: str) -> None:
    """Remove what has a name of `temporary_of` for this file."""
    files, path = file_system(url)
    prefix = temporary_of(path).rpartition("-")[0] + "-"
    for name in files.ls(os.path.dirname(path), detail=False):
        if str(name).startswith(prefix) and "-" not in str(name)[len(prefix) :]:
            files.rm(name)


def _probe(files: Any, directory: str) -> None:
    """Write a file and remove it. Raises `OSError`."""
    probe = temporary_of(f"{directory.rstrip('/')}/probe")
    files.pipe_file(probe, b"")
    files.rm(probe)
