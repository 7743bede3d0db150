"""Send a sealed venv as a stream of chunks, which another node unpacks, checks and seals.

::

    list_venv ─► Listing (paths, sizes, hashes)  ───────────────► Unpacker: needed chunks, files that exist already
    read_chunk(i) ─► compressed, with its sha256 ─► decode_chunk ─► Unpacker.feed(i) ─► finish: rewrite scripts

Chunk `i` holds bytes `i * CHUNK_BYTES` to `(i + 1) * CHUNK_BYTES` of the concatenated files, in the order of the
listing. So every node that has the venv can create any chunk at any time, with one chunk in memory.

The stream holds packages, bytecode and scripts. It does not hold the files that depend on the venv's location: the
receiver creates them with `uv venv`, and rewrites the first lines of the scripts. Only regular files with paths below
the venv are sent, so there are no links that lead out. Every file of a wheel is compared with the hash in its RECORD.
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
from nemo_rl.venvs.storage.manifest import read_manifest, write_atomically
from nemo_rl.venvs.storage.verify import MANIFEST_FILE, recorded_files, records_of

CHUNK_BYTES = 8 * 2**20
# sha256 of everything after it; codec; length of the raw bytes.
_HEADER = struct.Struct("<32scI")
_HASH_BYTES = 32
_RAW, _ZLIB, _ZSTD = b"r", b"z", b"s"
_LEVEL = 1  # the network is fast, so more compression would only slow down the sender
_HEAD_BYTES = 1024
_EXCLUDED = frozenset((MANIFEST_FILE, LEASE_FILE, ".lock", "pyvenv.cfg"))


class Entry(NamedTuple):
    """Describes one file.

    Attributes:
        path: path relative to the venv, with `/`.
        size: size in bytes.
        is_executable: whether the owner may execute the file.
        mtime_ns: modification time; bytecode is valid only for a source with the right time.
        sha256: hash in the package's RECORD, hexadecimal; None for bytecode and other files that no RECORD lists.
    """

    path: str
    size: int
    is_executable: bool
    mtime_ns: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """Lists the files of a sealed venv in the order of the stream. Picklable.

    Attributes:
        digest: digest of the venv.
        root: directory of the venv on the sender, which its scripts name.
        entries: the files.
    """

    digest: str
    root: str
    entries: tuple[Entry, ...]

    @cached_property
    def key(self) -> str:
        """Identity of the stream. Chunks of streams with different keys must not be combined."""
        text = repr((self.digest, self.root, CHUNK_BYTES, self.entries))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def starts(self) -> list[int]:
        """Offset of each file in the stream, then the total size."""
        starts = [0]
        for entry in self.entries:
            starts.append(starts[-1] + entry.size)
        return starts

    @property
    def num_chunks(self) -> int:
        """Number of chunks in the stream."""
        return -(-self.starts[-1] // CHUNK_BYTES)

    def pieces(self, chunk: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index of the file, first byte, end) for each file that the chunk contains a part of."""
        low = chunk * CHUNK_BYTES
        high = min(low + CHUNK_BYTES, self.starts[-1])
        index = bisect.bisect_right(self.starts, low) - 1
        while index < len(self.entries) and self.starts[index] < high:
            start, entry = self.starts[index], self.entries[index]
            if entry.size:
                yield index, max(low - start, 0), min(high - start, entry.size)
            index += 1

    def chunks_of(self, index: int) -> range:
        """Return the chunks that contain parts of a file."""
        start, end = self.starts[index], self.starts[index + 1]
        return range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES)) if end > start else range(0)

    def __getstate__(self) -> dict[str, Any]:
        return {"digest": self.digest, "root": self.root, "entries": self.entries}


def list_venv(root: Path) -> Listing:
    """List the files of the sealed venv in `root`. Raises `VenvError` if it is not sealed."""
    digest = read_manifest(root).digest
    hashes = _recorded_hashes(root)
    entries = []
    for directory, names, files in os.walk(root):
        names.sort()
        relative = os.path.relpath(directory, root)
        for name in sorted(files):
            path = name if relative == "." else f"{relative}/{name}"
            absolute = os.path.join(directory, name)
            # The receiver creates the links in bin/, to the interpreter and to programs of a base, itself. Other links
            # come from uv's link mode.
            if path in _EXCLUDED or (relative == "bin" and os.path.islink(absolute)):
                continue
            status = os.stat(absolute)
            if stat.S_ISREG(status.st_mode):
                is_executable = bool(status.st_mode & stat.S_IXUSR)
                entries.append(Entry(path, status.st_size, is_executable, status.st_mtime_ns, hashes.get(path)))
    return Listing(digest, str(root), tuple(entries))


def _recorded_hashes(root: Path) -> dict[str, str]:
    """Return path relative to `root` -> sha256 of every file whose hash a RECORD contains.

    A file that several packages list with different hashes is left out: which of them provided it is not known.
    """
    hashes: dict[str, set[str]] = {}
    for record in records_of(str(site_packages_of(root))):
        for file in recorded_files(record):
            if file.algorithm == "sha256" and file.digest is not None:
                hashes.setdefault(os.path.relpath(file.path, root), set()).add(file.digest)
    return {path: digests.pop() for path, digests in hashes.items() if len(digests) == 1}


def read_chunk(listing: Listing, chunk: int) -> bytes:
    """Read and encode a chunk of a venv on this node. Raises `BroadcastError` if the venv differs from its listing."""
    parts = []
    for index, begin, end in listing.pieces(chunk):
        path = os.path.join(listing.root, listing.entries[index].path)
        try:
            with open(path, "rb") as file:
                file.seek(begin)
                part = file.read(end - begin)
        except OSError as error:
            raise BroadcastError(f"{path} cannot be read: {error.strerror}.") from None
        if len(part) != end - begin:
            raise BroadcastError(f"{path} has changed since the venv was listed.")
        parts.append(part)
    return encode_chunk(b"".join(parts))


def encode_chunk(raw: bytes) -> bytes:
    """Compress raw bytes and prepend a header with their sha256.

    Uses zstd if pyarrow is installed, as in the driver's Python, else zlib; incompressible bytes stay as they are.
    """
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
    """Check and decompress an encoded chunk. Raises `BroadcastError` if it is incomplete or changed."""
    if len(data) < _HEADER.size:
        raise BroadcastError("a chunk is incomplete: it is shorter than its header.")
    digest, codec, length = _HEADER.unpack_from(data)
    if hashlib.sha256(memoryview(data)[_HASH_BYTES:]).digest() != digest or length > CHUNK_BYTES:
        raise BroadcastError("a chunk differs from the sent chunk: its sha256 does not match.")
    try:
        raw = _decompressed(codec, memoryview(data)[_HEADER.size :], length)
    except (OSError, zlib.error) as error:
        raise BroadcastError(f"a chunk cannot be decompressed: {error}") from None
    if len(raw) != length:
        raise BroadcastError(f"a chunk has {len(raw)} bytes, but its header says {length}.")
    return raw


def _decompressed(codec: bytes, payload: memoryview, length: int) -> bytes:
    if codec == _RAW:
        return bytes(payload)
    if codec == _ZLIB:
        return zlib.decompressobj().decompress(payload, length)
    if codec == _ZSTD and (zstd := _zstd()) is not None:
        raw: bytes = zstd.decompress(payload, decompressed_size=length, asbytes=True)
        return raw
    raise BroadcastError(f"a chunk is compressed with a codec ({codec!r}) that this node does not support.")


def _zstd() -> Any:
    try:
        import pyarrow
    except ImportError:
        return None
    return pyarrow.Codec("zstd", compression_level=_LEVEL)


class Unpacker:
    """Writes a stream into a directory in which `uv venv` has created an empty venv.

    Chunks must be fed in increasing order; only those in `needed` are required. Existing files are kept.

    Example::

        unpacker = Unpacker(listing, root)
        unpacker.link_from(sealed_venvs)
        for chunk in unpacker.needed:
            unpacker.feed(chunk, decode_chunk(fetch(chunk)))
        unpacker.finish()

    Raises:
        BroadcastError: from every method. A listing with a path that leads out of the venv is rejected before anything
            is written.
    """

    def __init__(self, listing: Listing, root: Path) -> None:
        self._listing, self._root = listing, root
        for entry in listing.entries:
            _check_path(entry.path)
        self._missing = {i for i, e in enumerate(listing.entries) if not os.path.lexists(root / e.path)}
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._num_written = 0
        for directory in sorted({os.path.dirname(listing.entries[i].path) for i in self._missing}):
            (root / directory).mkdir(mode=0o755, parents=True, exist_ok=True)
            if not (root / directory).resolve().is_relative_to(root.resolve()):
                raise BroadcastError(f"the venv is rejected: its entries in {directory!r} would lead out of it.")
        for index in [i for i in self._missing if listing.entries[i].size == 0]:
            (root / listing.entries[index].path).touch()
            self._finish_file(index)

    def link_from(self, donors: Iterable[Path]) -> int:
        """Hard-link files that sealed venvs on this disk (`donors`) already hold; return their total size in bytes."""
        by_hash: dict[str, list[int]] = {}
        for index in self._missing:
            entry = self._listing.entries[index]
            if entry.sha256 is not None and not entry.path.startswith("bin/"):  # scripts will be rewritten
                by_hash.setdefault(entry.sha256, []).append(index)
        num_linked = 0
        for donor in donors:
            for path, digest in _recorded_hashes(donor).items() if by_hash else ():
                for index in by_hash.get(digest, ()):
                    if index in self._missing and self._link(donor / path, index):
                        self._missing.discard(index)
                        num_linked += self._listing.entries[index].size
        return num_linked

    def _link(self, source: Path, index: int) -> bool:
        entry = self._listing.entries[index]
        try:
            status = source.stat()
            # The bytecode in the stream is valid only for a source with the same time in whole seconds.
            same_time = not entry.path.endswith(".py") or int(status.st_mtime) == entry.mtime_ns // 10**9
            if status.st_size != entry.size or not same_time or bool(status.st_mode & 0o100) != entry.is_executable:
                return False
            with source.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    return False
            os.link(source, self._root / entry.path)
        except OSError:
            return False  # the file has been removed, or has too many links: take it from the stream
        return True

    @property
    def needed(self) -> list[int]:
        """The chunks that contain parts of missing files, in increasing order."""
        return sorted({chunk for index in self._missing for chunk in self._listing.chunks_of(index)})

    def feed(self, chunk: int, raw: bytes) -> None:
        """Write the raw bytes of a chunk to the missing files."""
        offset = 0
        for index, begin, end in self._listing.pieces(chunk):
            part = memoryview(raw)[offset : offset + end - begin]
            offset += end - begin
            if index in self._missing:
                self._write(index, begin, part)
        if offset != len(raw):
            raise BroadcastError(f"chunk {chunk} has {len(raw)} bytes instead of {offset}.")

    def _write(self, index: int, begin: int, part: memoryview) -> None:
        entry = self._listing.entries[index]
        if begin == 0:
            self.close()
            self._file, self._hash = open(self._root / entry.path, "xb"), hashlib.sha256()  # noqa: SIM115
            self._num_written = 0
        if self._file is None or begin != self._num_written:
            raise BroadcastError(f"the part of {entry.path} before byte {begin} is missing.")
        self._file.write(part)
        self._hash.update(part)
        self._num_written += len(part)
        if self._num_written == entry.size:
            self.close()
            if entry.sha256 not in (None, self._hash.hexdigest()):
                raise BroadcastError(f"{entry.path} does not match the hash in its package's RECORD.")
            self._finish_file(index)

    def _finish_file(self, index: int) -> None:
        entry = self._listing.entries[index]
        path = self._root / entry.path
        path.chmod(0o755 if entry.is_executable else 0o644)
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
        self._missing.discard(index)

    def finish(self) -> None:
        """Check that no file is missing, and make the scripts start this venv's interpreter."""
        if self._missing:
            first = self._listing.entries[min(self._missing)].path
            raise BroadcastError(f"{len(self._missing)} files are missing, such as {first}.")
        changed = {}
        for entry in self._listing.entries:
            if entry.path.startswith("bin/") and (content := self._rewrite_script(self._root / entry.path)) is not None:
                changed[entry.path] = content
        _update_records(self._root, changed)

    def _rewrite_script(self, script: Path) -> bytes | None:
        """Let a script start this venv's interpreter; return its new content, None if it is unchanged."""
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
        """Close the file that is being written."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _check_path(path: str) -> None:
    parts = path.split("/")
    if path.startswith("/") or "\0" in path or "\\" in path or {"", ".", ".."} & set(parts):
        raise BroadcastError(f"the venv is rejected: its entry {path!r} would lead out of it.")
    if path in _EXCLUDED:
        raise BroadcastError(f"the venv is rejected: only the receiver may create {path!r}.")


def _update_records(root: Path, changed: dict[str, bytes]) -> None:
    """Update the hashes of changed files in each RECORD, so that `verify` accepts them."""
    site_packages = site_packages_of(root)
    prefix = site_packages.relative_to(root)
    for record in site_packages.glob("*.dist-info/RECORD") if changed else ():
        rows = list(csv.reader(io.StringIO(record.read_text(encoding="utf-8"))))
        is_changed = False
        for row in rows:
            content = changed.get(os.path.normpath(prefix / row[0])) if row else None
            if content is not None:
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                row[1:3] = [f"sha256={digest}", str(len(content))]
                is_changed = True
        if is_changed:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            write_atomically(record, text.getvalue().encode())
