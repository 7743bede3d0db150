"""Records on disk what became of every task of a segment.

Each worker appends to a separate file, so workers do not wait for each other. A worker that is killed leaves at most
one incomplete entry at the end of its file; after a power failure the file may end in zeros. A file is read up to its
last complete entry. A source task is done when every leaf of its tree is
recorded::

    source 3 ──fan-out 2──┬── 3.0 ── result (its task is stored here)
                          └── 3.1 ── dropped

Its results count only then. If a worker dies after it wrote an entry and its tasks run again, the same keys are written
again. Results are read once per key, so every input is in the output exactly once, no matter when workers die.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from nemo_rl.errors import DataError, PipelineError
from nemo_rl.pipelines.items import Item, Key
from nemo_rl.pipelines.tasks import Task
from nemo_rl.pipelines.trusted_files import append_private, open_trusted
from nemo_rl.utils.files import sync_directory, write_atomically

logger = logging.getLogger(__name__)

Kind = Literal["result", "gone", "fan"]
_FRAME = struct.Struct(">QQ")
_FROZEN = "frozen.json"


@dataclass(frozen=True)
class Entry:
    """Records what became of one task.

    Attributes:
        kind: "result": the last stage returned it. "gone": it was dropped or failed. "fan": it became `detail` tasks.
        key: key of the task.
        detail: number of child tasks, for "fan".
        place: file, offset and length of the pickled task, for "result".
    """

    kind: Kind
    key: Key
    detail: int | None = None
    place: tuple[str, int, int] | None = None


class SpoolWriter:
    """Appends entries to this worker's file. Each call of `write` is atomic."""

    def __init__(self, directory: Path, attempt: int) -> None:
        self._path = directory / f"{attempt:04d}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.log"
        self._file: IO[bytes] | None = None

    def write(self, entries: Sequence[Entry], results: Sequence[Item] = ()) -> None:
        """Append entries, and a "result" entry for each item: all of them or none.

        Raises:
            DataError: the file cannot be written, for example because the disk is full.
        """
        frames = [_framed(entry, b"") for entry in entries]
        frames += [_framed(Entry("result", item.key), dumps(item.task)) for item in results]
        if not frames:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = append_private(self._path)
            _append(self._file, b"".join(frames))
        except OSError as error:
            raise DataError(f"{self._path} cannot be written: {error}") from error

    def close(self) -> None:
        """Flush the file to disk and close it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _append(file: IO[bytes], content: bytes) -> None:
    """Write everything or nothing. Entries after an incomplete one could not be read."""
    size = os.fstat(file.fileno()).st_size
    data = memoryview(content)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def _framed(entry: Entry, body: bytes) -> bytes:
    head = pickle.dumps((entry.kind, entry.key, entry.detail))
    return _FRAME.pack(len(head), len(body)) + head + body


@dataclass
class Spool:
    """Holds the entries of all workers of a segment. The tasks stay on disk until they are loaded.

    Attributes:
        attempts: attempt -> key -> entry.
    """

    attempts: dict[int, dict[Key, Entry]] = field(default_factory=dict)

    @staticmethod
    def read(directory: Path) -> Spool:
        """Read the entries of a segment. A missing directory has none."""
        spool = Spool()
        attempt, sizes = _frozen(directory.parent)
        for path in sorted(directory.glob("*.log")) if directory.is_dir() else []:
            entries = spool.attempts.setdefault(_attempt(path), {})
            limit = sizes.get(_name(path), 0) if _attempt(path) < attempt else path.stat().st_size
            for entry in _read_entries(path, limit):
                entries.setdefault(entry.key, entry)
        return spool

    def leaves_of(self, source: int) -> list[Entry] | None:
        """Return the leaf entries ("result" or "gone") of a source task, or None if it is not done."""
        for entries in self.attempts.values():
            leaves = _leaves(entries, (source,))
            if leaves is not None:
                return leaves
        return None

    def removed_keys(self, num_sources: int) -> set[Key]:
        """Return the keys of dropped and failed tasks, among the sources that are done."""
        leaves = [entry for source in range(num_sources) for entry in self.leaves_of(source) or []]
        return {entry.key for entry in leaves if entry.kind == "gone"}

    def results(self, num_sources: int) -> tuple[list[Entry], list[int]]:
        """Return the results of all sources that are done, in order, and the numbers of the unfinished sources."""
        results: dict[Key, Entry] = {}
        missing: list[int] = []
        for source in range(num_sources):
            entries = self.leaves_of(source)
            if entries is None:
                missing.append(source)
            else:
                results.update((entry.key, entry) for entry in entries if entry.kind == "result")
        return [results[key] for key in sorted(results)], missing


def _leaves(entries: dict[Key, Entry], root: Key) -> list[Entry] | None:
    leaves: list[Entry] = []
    waiting = [root]
    while waiting:
        key = waiting.pop()
        entry = entries.get(key)
        if entry is None:
            return None
        if entry.kind == "fan":
            assert entry.detail is not None
            waiting += [(*key, index) for index in range(entry.detail)]
        else:
            leaves.append(entry)
    return leaves


def sync(directory: Path) -> None:
    """Wait until the entries of all workers are on disk. A worker that was killed has not flushed its file."""
    for path in directory.glob("*.log"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_directory(directory)


def freeze(root: Path, attempt: int) -> None:
    """Ignore everything that workers of attempts before `attempt` append to the spools below `root` from now on.

    Such workers may outlive their driver for a while, and their entries could contradict those of this attempt.
    """
    before, sizes = _frozen(root)
    for path in root.glob("*/*.log"):
        if before <= _attempt(path) < attempt:
            sizes[_name(path)] = path.stat().st_size
    if attempt > 1:
        write_atomically(root / _FROZEN, json.dumps({"attempt": attempt, "sizes": sizes}))


def _frozen(root: Path) -> tuple[int, dict[str, int]]:
    """Return the first attempt that is not frozen, and the size in bytes up to which each older file is read."""
    path = root / _FROZEN
    if not path.exists():
        return 0, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        # Without the sizes, entries of older attempts cannot be trusted; their tasks run again.
        attempt = max((_attempt(log) for log in root.glob("*/*.log")), default=0)
        logger.warning("%s cannot be read (%s): attempts before %d are ignored", path, error, attempt)
        return attempt, {}
    return content["attempt"], content["sizes"]


def _attempt(log: Path) -> int:
    return int(log.name.partition("-")[0])


def _name(log: Path) -> str:
    return f"{log.parent.name}/{log.name}"


def _read_entries(path: Path, size: int) -> Iterator[Entry]:
    """Yield the entries in the first `size` bytes, up to the first that is incomplete or did not reach the disk."""
    with open_trusted(path) as file:
        while True:
            start = file.tell()
            frame = file.read(_FRAME.size)
            if start + _FRAME.size > size or len(frame) < _FRAME.size:
                return
            head_bytes, body_bytes = _FRAME.unpack(frame)
            body_start = start + _FRAME.size + head_bytes
            end = body_start + body_bytes
            if end > size:
                return  # incomplete: its writer was killed
            head = file.read(head_bytes)
            if not head.endswith(pickle.STOP):
                return  # zeros, which a power failure left
            kind, key, detail = pickle.loads(head)
            if body_bytes:
                file.seek(end - 1)
                if file.read(1) != pickle.STOP:
                    return
            yield Entry(kind, key, detail, (str(path), body_start, body_bytes) if kind == "result" else None)
            file.seek(end)


class SpooledTask(Task[tuple[str, int, int]]):
    """Refers to a task on disk by file, offset and length."""

    @staticmethod
    def from_entry(entry: Entry) -> SpooledTask:
        assert entry.place is not None
        return SpooledTask("spooled", "", entry.place)

    @property
    def num_bytes(self) -> int:
        return self.data[2]

    def load(self) -> Task[Any]:
        """Read the task. Raises `PipelineError` if the file cannot be read."""
        path, offset, length = self.data
        try:
            with open_trusted(path) as file:
                file.seek(offset)
                return pickle.loads(file.read(length))
        except OSError as error:
            raise PipelineError(
                f"a task that an earlier stage stored in {path} cannot be read: {error}. On several nodes the run "
                "directory (Pipeline.run(run_dir=...)) must be on a file system that all of them share."
            ) from error


class SpooledTasks(Sequence[Task[Any]]):
    """A sequence of results, each read from disk on access."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return SpooledTasks(self._entries[index])
        return SpooledTask.from_entry(self._entries[index]).load()


def dumps(value: Any) -> bytes:
    """Pickle a value. Classes of the main script and other modules that cannot be imported are pickled by value."""
    from ray import cloudpickle

    return cloudpickle.dumps(value)
