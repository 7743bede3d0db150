"""A sealed venv as a stream of chunks that another node's store can unpack, check and seal as its own.

::

    list_venv ─► Listing (paths, sizes, hashes)  ───────────────► Unpacker: what is needed, what is here already
    read_chunk(i) ─► compressed, with its sha256 ─► decode_chunk ─► Unpacker.feed(i) ─► finish: scripts name this node

Chunk `i` is bytes `i * CHUNK_BYTES` to `(i + 1) * CHUNK_BYTES` of all files one after another, in the order of the
listing. So any chunk can be made at any time, in any order and by any node that has the venv, with one chunk in memory.

What travels are packages, bytecode and scripts. What binds a venv to its place does not: `uv venv` makes that anew
where it arrives, and the scripts' first lines are rewritten. Only regular files with paths below the venv travel; there
are no links that could lead out. Every file that a wheel brought is compared with the hash in its RECORD.
"""

from __future__ import annotations

import base64
import bisect
import csv
import hashlib
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

from nemo_rl.errors import BroadcastError
from nemo_rl.venvs.building.build import site_packages_of
from nemo_rl.venvs.storage.locks import LEASE_FILE
from nemo_rl.venvs.storage.manifest import MANIFEST_FILE, read_manifest, write_atomically

CHUNK_BYTES = 8 * 2**20
# sha256 of all that follows; codec; length of the raw bytes.
_HEADER = struct.Struct("<32scI")
_HASH_BYTES = 32
_RAW, _ZLIB, _ZSTD = b"r", b"z", b"s"
_LEVEL = 1  # links are fast: more compression would only hold up the sender
_HEAD_BYTES = 1024
_LEFT_OUT = frozenset((MANIFEST_FILE, LEASE_FILE, ".lock", "pyvenv.cfg"))


class Entry(NamedTuple):
    """One file.

    Attributes:
        path: below the venv, with `/`.
        size: in bytes.
        is_executable: whether its owner may run it.
        mtime_ns: bytecode is valid only for a source of the right time.
        sha256: what its package's RECORD says, hexadecimal; None for bytecode and what else no RECORD names.
    """

    path: str
    size: int
    is_executable: bool
    mtime_ns: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The files of one sealed venv, in the order of the stream. Picklable.

    Attributes:
        digest: of the venv. root: its directory on the node that listed it; its scripts name that.
    """

    digest: str
    root: str
    entries: tuple[Entry, ...]

    @cached_property
    def key(self) -> str:
        """Equal for equal streams: chunks that arrived under one key go on under no other."""
        text = repr((self.digest, self.root, CHUNK_BYTES, self.entries))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def starts(self) -> list[int]:
        """Where each file starts in the stream, and where the last one ends."""
        starts = [0]
        for entry in self.entries:
            starts.append(starts[-1] + entry.size)
        return starts

    @property
    def num_chunks(self) -> int:
        return -(-self.starts[-1] // CHUNK_BYTES)

    def pieces(self, chunk: int) -> Iterator[tuple[int, int, int]]:
        """(index of the entry, from, to) of every part of a file that is in a chunk."""
        low = chunk * CHUNK_BYTES
        high = min(low + CHUNK_BYTES, self.starts[-1])
        index = bisect.bisect_right(self.starts, low) - 1
        while index < len(self.entries) and self.starts[index] < high:
            start, entry = self.starts[index], self.entries[index]
            if entry.size:
                yield index, max(low - start, 0), min(high - start, entry.size)
            index += 1

    def chunks_of(self, index: int) -> range:
        """The chunks that hold parts of one file."""
        start, end = self.starts[index], self.starts[index + 1]
        return range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES)) if end > start else range(0)

    def __getstate__(self) -> dict[str, Any]:
        return {"digest": self.digest, "root": self.root, "entries": self.entries}


def list_venv(root: Path) -> Listing:
    """List the sealed venv in `root`. Raises `VenvError` when it is not sealed."""
    digest = read_manifest(root).digest
    hashes = dict(_recorded(root))
    entries = []
    for directory, names, files in os.walk(root):
        names.sort()
        below = os.path.relpath(directory, root)
        for name in sorted(files):
            path = name if below == "." else f"{below}/{name}"
            full = os.path.join(directory, name)
            # Links in bin/ name the interpreter or a base's program: made anew. Elsewhere a link is uv's link mode.
            if path in _LEFT_OUT or (below == "bin" and os.path.islink(full)):
                continue
            status = os.stat(full)
            if stat.S_ISREG(status.st_mode):
                is_executable = bool(status.st_mode & stat.S_IXUSR)
                entries.append(Entry(path, status.st_size, is_executable, status.st_mtime_ns, hashes.get(path)))
    return Listing(digest, str(root), tuple(entries))


def _recorded(root: Path) -> Iterator[tuple[str, str]]:
    """(path below `root`, sha256) of every file that a RECORD gives a hash for."""
    site_packages = site_packages_of(root)
    prefix = site_packages.relative_to(root)
    for record in site_packages.glob("*.dist-info/RECORD"):
        for row in csv.reader(record.read_text(encoding="utf-8").splitlines()):
            if len(row) > 1 and row[1].startswith("sha256="):
                padded = row[1].removeprefix("sha256=") + "=="
                yield os.path.normpath(prefix / row[0]), base64.urlsafe_b64decode(padded).hex()


# --- chunks ---------------------------------------------------------------------------------------------------


def read_chunk(listing: Listing, chunk: int) -> bytes:
    """A chunk, compressed and with its hash. Raises `BroadcastError` when the venv is not what was listed any more."""
    parts = []
    for index, begin, end in listing.pieces(chunk):
        path = os.path.join(listing.root, listing.entries[index].path)
        try:
            with open(path, "rb") as file:
                file.seek(begin)
                part = file.read(end - begin)
        except OSError as error:
            raise BroadcastError(f"{path} cannot be read any more: {error.strerror}.") from None
        if len(part) != end - begin:
            raise BroadcastError(f"{path} has changed since it was listed.")
        parts.append(part)
    return encode_chunk(b"".join(parts))


def encode_chunk(raw: bytes) -> bytes:
    """Compress where that helps: zstd where pyarrow is installed, as in the driver's Python, else zlib."""
    zstd = _zstd()
    if zstd is not None:
        codec, payload = _ZSTD, zstd.compress(raw, asbytes=True)
    else:
        codec, payload = _ZLIB, zlib.compress(raw, _LEVEL)
    if len(payload) >= len(raw):
        codec, payload = _RAW, raw
    content = _HEADER.pack(b"", codec, len(raw))[_HASH_BYTES:] + payload
    return hashlib.sha256(content).digest() + content


def decode_chunk(data: bytes) -> bytes:
    """The raw bytes of a chunk. Raises `BroadcastError` for one that is not what was sent."""
    if len(data) < _HEADER.size:
        raise BroadcastError("a chunk is cut short.")
    digest, codec, length = _HEADER.unpack_from(data)
    if hashlib.sha256(memoryview(data)[_HASH_BYTES:]).digest() != digest or length > CHUNK_BYTES:
        raise BroadcastError("a chunk is not what was sent: its sha256 differs.")
    try:
        raw = _decompressed(codec, memoryview(data)[_HEADER.size :], length)
    except (OSError, zlib.error) as error:
        raise BroadcastError(f"a chunk cannot be decompressed: {error}") from None
    if len(raw) != length:
        raise BroadcastError("a chunk has another length than it says.")
    return raw


def _decompressed(codec: bytes, payload: memoryview, length: int) -> bytes:
    if codec == _RAW:
        return bytes(payload)
    if codec == _ZLIB:
        return zlib.decompressobj().decompress(payload, length)
    if codec == _ZSTD and (zstd := _zstd()) is not None:
        raw: bytes = zstd.decompress(payload, decompressed_size=length, asbytes=True)
        return raw
    raise BroadcastError(f"a chunk is compressed in a way ({codec!r}) that cannot be undone here.")


def _zstd() -> Any:
    try:
        import pyarrow
    except ImportError:
        return None
    return pyarrow.Codec("zstd", compression_level=_LEVEL)


# --- unpacking ------------------------------------------------------------------------------------------------


class Unpacker:
    """Writes a stream into a directory in which `uv venv` has made an empty venv.

    Chunks may come in rising order only, and only those in `needed` have to. Files that are there already stay.

    Raises:
        BroadcastError: from any method; a listing with a path that leads out is refused before anything is written.
    """

    def __init__(self, listing: Listing, root: Path) -> None:
        self._listing, self._root = listing, root
        for entry in listing.entries:
            _check_path(entry.path)
        self._wanted = {i for i, e in enumerate(listing.entries) if not os.path.lexists(root / e.path)}
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._done = 0
        for directory in sorted({os.path.dirname(listing.entries[i].path) for i in self._wanted}):
            (root / directory).mkdir(mode=0o755, parents=True, exist_ok=True)
            if not (root / directory).resolve().is_relative_to(root.resolve()):
                raise BroadcastError(f"the venv is not unpacked: its entries in {directory!r} would lead out of it.")
        for index in [i for i in self._wanted if listing.entries[i].size == 0]:
            (root / listing.entries[index].path).touch()
            self._finish_file(index)

    def adopt(self, donors: Iterable[Path]) -> int:
        """Link what sealed venvs of this disk (`donors`) hold already; returns the bytes that need not come."""
        by_hash: dict[str, list[int]] = {}
        for index in self._wanted:
            entry = self._listing.entries[index]
            if entry.sha256 is not None and not entry.path.startswith("bin/"):  # scripts will be rewritten
                by_hash.setdefault(entry.sha256, []).append(index)
        adopted = 0
        for donor in donors:
            for path, digest in _recorded(donor) if by_hash else ():
                for index in by_hash.get(digest, ()):
                    if index in self._wanted and self._adopt(donor / path, index):
                        self._wanted.discard(index)
                        adopted += self._listing.entries[index].size
        return adopted

    def _adopt(self, source: Path, index: int) -> bool:
        entry = self._listing.entries[index]
        try:
            status = source.stat()
            # Bytecode that arrives is valid only for a source of the same whole second.
            same_time = not entry.path.endswith(".py") or int(status.st_mtime) == entry.mtime_ns // 10**9
            if status.st_size != entry.size or not same_time or bool(status.st_mode & 0o100) != entry.is_executable:
                return False
            with source.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    return False
            os.link(source, self._root / entry.path)
        except OSError:
            return False  # gone, or too many links: the file comes with the stream
        return True

    @property
    def needed(self) -> list[int]:
        """The chunks that hold something which is not here yet."""
        return sorted({chunk for index in self._wanted for chunk in self._listing.chunks_of(index)})

    def feed(self, chunk: int, raw: bytes) -> None:
        """Take the raw bytes of a chunk."""
        offset = 0
        for index, begin, end in self._listing.pieces(chunk):
            part = memoryview(raw)[offset : offset + end - begin]
            offset += end - begin
            if index in self._wanted:
                self._write(index, begin, part)
        if offset != len(raw):
            raise BroadcastError(f"chunk {chunk} has {len(raw)} bytes instead of {offset}.")

    def _write(self, index: int, begin: int, part: memoryview) -> None:
        entry = self._listing.entries[index]
        if begin == 0:
            self.close()
            self._file, self._hash, self._done = open(self._root / entry.path, "xb"), hashlib.sha256(), 0  # noqa: SIM115
        if self._file is None or begin != self._done:
            raise BroadcastError(f"the part of {entry.path} before byte {begin} is missing.")
        self._file.write(part)
        self._hash.update(part)
        self._done += len(part)
        if self._done == entry.size:
            self.close()
            if entry.sha256 not in (None, self._hash.hexdigest()):
                raise BroadcastError(f"{entry.path} is not what its package's RECORD says.")
            self._finish_file(index)

    def _finish_file(self, index: int) -> None:
        entry = self._listing.entries[index]
        path = self._root / entry.path
        path.chmod(0o755 if entry.is_executable else 0o644)
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
        self._wanted.discard(index)

    def finish(self) -> None:
        """Everything is here: let the scripts start this venv's interpreter."""
        if self._wanted:
            missing = self._listing.entries[min(self._wanted)].path
            raise BroadcastError(f"{len(self._wanted)} files have not arrived, {missing} among them.")
        changed = {}
        for entry in self._listing.entries:
            if entry.path.startswith("bin/") and (content := self._moved(self._root / entry.path)) is not None:
                changed[entry.path] = content
        _update_records(self._root, changed)

    def _moved(self, script: Path) -> bytes | None:
        """A script's content after its first lines were made to name this venv; None for what names no venv."""
        with script.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            if not head.startswith(b"#!") or os.fsencode(self._listing.root) not in head:
                return None
            content = head.replace(os.fsencode(self._listing.root), os.fsencode(self._root)) + file.read()
        mode = script.stat().st_mode
        script.unlink()
        script.write_bytes(content)
        script.chmod(mode & 0o777)
        return content

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _check_path(path: str) -> None:
    parts = path.split("/")
    if path.startswith("/") or "\0" in path or "\\" in path or {"", ".", ".."} & set(parts):
        raise BroadcastError(f"the venv is not unpacked: its entry {path!r} would lead out of it.")
    if path in _LEFT_OUT:
        raise BroadcastError(f"the venv is not unpacked: its entry {path!r} is this node's to write.")


def _update_records(root: Path, changed: dict[str, bytes]) -> None:
    """Make RECORDs name the scripts as they are now, so that `verify` finds what was installed."""
    site_packages = site_packages_of(root)
    prefix = site_packages.relative_to(root)
    for record in site_packages.glob("*.dist-info/RECORD") if changed else ():
        rows = list(csv.reader(record.read_text(encoding="utf-8").splitlines()))
        touched = False
        for row in rows:
            content = changed.get(os.path.normpath(prefix / row[0])) if row else None
            if content is not None:
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                row[1:3] = [f"sha256={digest}", str(len(content))]
                touched = True
        if touched:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            write_atomically(record, text.getvalue().encode())
