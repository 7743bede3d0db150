"""The record of what became of every task of a segment, on disk, appended by all of its workers.

Each worker appends to a file of its own, so nobody waits for anybody; a worker that is killed leaves at most one
incomplete entry at the end of its file, which is not read. A source task is done when its whole tree is accounted for::

    source 3 ──fan-out 2──┬── 3.0 ── result (its task is kept here)
                          └── 3.1 ── dropped

Only then do its results count. A worker that died after it wrote an entry, and whose tasks ran again, wrote the same
keys: results are taken once per key. So every input is in the output exactly once, whoever dies when.
"""

from __future__ import annotations

import json
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
from nemo_rl.pipelines.own_files import append_own, open_own
from nemo_rl.pipelines.tasks import Task
from nemo_rl.utils.files import write_atomically

Kind = Literal["result", "gone", "fan"]
_FRAME = struct.Struct(">QQ")
_FROZEN = "frozen.json"


@dataclass(frozen=True)
class Entry:
    """What became of the task with a key.

    Attributes:
        kind: "result": it left the last stage; "gone": dropped or failed; "fan": it became `detail` tasks.
        place: file, offset and length of the result's task.
    """

    kind: Kind
    key: Key
    detail: int | None = None
    place: tuple[str, int, int] | None = None


class SpoolWriter:
    """Appends entries. Whole groups are written at once."""

    def __init__(self, directory: Path, attempt: int) -> None:
        self._path = directory / f"{attempt:04d}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.log"
        self._file: IO[bytes] | None = None

    def write(self, entries: Sequence[Entry], results: Sequence[Item] = ()) -> None:
        """Append entries, and a "result" for each item: all of them, or none.

        Raises:
            DataError: they cannot be written, for example because the disk is full.
        """
        frames = [_framed(entry, b"") for entry in entries]
        frames += [_framed(Entry("result", item.key), dumps(item.task)) for item in results]
        if not frames:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = append_own(self._path)
            _append(self._file, b"".join(frames))
        except OSError as error:
            raise DataError(f"{self._path} cannot be written: {error}") from error

    def close(self) -> None:
        """Make what was written last."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _append(file: IO[bytes], content: bytes) -> None:
    """Write all of it or nothing: what comes later could not be read behind a part of an entry."""
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
    """The entries of all workers of a segment, as they are on disk now. Tasks stay there until they are asked for.

    Attributes:
        attempts: attempt -> key -> entry.
    """

    attempts: dict[int, dict[Key, Entry]] = field(default_factory=dict)

    @staticmethod
    def read(directory: Path) -> Spool:
        """Read the entries of a segment; none when there is no such directory."""
        spool = Spool()
        attempt, sizes = _frozen(directory.parent)
        for path in sorted(directory.glob("*.log")) if directory.is_dir() else []:
            entries = spool.attempts.setdefault(_attempt(path), {})
            limit = sizes.get(_name(path), 0) if _attempt(path) < attempt else path.stat().st_size
            for entry in _read_entries(path, limit):
                entries.setdefault(entry.key, entry)
        return spool

    def ends_of(self, source: int) -> list[Entry] | None:
        """What a source task became, each of it either "result" or "gone"; None when it is not done."""
        for entries in self.attempts.values():
            found = _ends(entries, (source,))
            if found is not None:
                return found
        return None

    def gone(self, num_sources: int) -> set[Key]:
        """Keys of tasks that were dropped or failed, of the sources that are done."""
        ends = [entry for source in range(num_sources) for entry in self.ends_of(source) or []]
        return {entry.key for entry in ends if entry.kind == "gone"}

    def results(self, num_sources: int) -> tuple[list[Entry], list[int]]:
        """The results of all sources that are done, in order, and the numbers of the others."""
        found: dict[Key, Entry] = {}
        missing: list[int] = []
        for source in range(num_sources):
            entries = self.ends_of(source)
            if entries is None:
                missing.append(source)
            else:
                found.update((entry.key, entry) for entry in entries if entry.kind == "result")
        return [found[key] for key in sorted(found)], missing


def _ends(entries: dict[Key, Entry], root: Key) -> list[Entry] | None:
    found: list[Entry] = []
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
            found.append(entry)
    return found


def freeze(root: Path, attempt: int) -> None:
    """Read nothing from now on that workers of attempts before `attempt` append to the spools below `root`.

    They may outlive their driver for a while, and what they say would then contradict what this attempt does.
    """
    before, sizes = _frozen(root)
    for path in root.glob("*/*.log"):
        if before <= _attempt(path) < attempt:
            sizes[_name(path)] = path.stat().st_size
    if attempt > 1:
        write_atomically(root / _FROZEN, json.dumps({"attempt": attempt, "sizes": sizes}))


def _frozen(root: Path) -> tuple[int, dict[str, int]]:
    """The first attempt that is not frozen, and up to where the spools of those before it are read."""
    path = root / _FROZEN
    if not path.exists():
        return 0, {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["attempt"], content["sizes"]


def _attempt(log: Path) -> int:
    return int(log.name.partition("-")[0])


def _name(log: Path) -> str:
    return f"{log.parent.name}/{log.name}"


def _read_entries(path: Path, size: int) -> Iterator[Entry]:
    with open_own(path) as file:
        while True:
            start = file.tell()
            frame = file.read(_FRAME.size)
            if start + _FRAME.size > size:
                return
            head_bytes, body_bytes = _FRAME.unpack(frame)
            body_start = start + _FRAME.size + head_bytes
            if body_start + body_bytes > size:
                return  # its writer was killed
            kind, key, detail = pickle.loads(file.read(head_bytes))
            place = (str(path), body_start, body_bytes) if kind == "result" else None
            yield Entry(kind, key, detail, place)
            file.seek(body_start + body_bytes)


class SpooledTask(Task[tuple[str, int, int]]):
    """A task that is on disk: file, offset, length."""

    @staticmethod
    def of(entry: Entry) -> SpooledTask:
        assert entry.place is not None
        return SpooledTask("spooled", "", entry.place)

    @property
    def num_bytes(self) -> int:
        return self.data[2]

    def load(self) -> Task[Any]:
        """Read it. Raises `PipelineError` when the file is not there."""
        path, offset, length = self.data
        try:
            with open_own(path) as file:
                file.seek(offset)
                return pickle.loads(file.read(length))
        except OSError as error:
            raise PipelineError(
                f"a task that an earlier stage kept in {path} cannot be read: {error}. On several nodes the run "
                "directory (Pipeline.run(run_dir=...)) must be on a file system that all of them share."
            ) from error


class SpooledTasks(Sequence[Task[Any]]):
    """Results that are read when they are asked for."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return SpooledTasks(self._entries[index])
        return SpooledTask.of(self._entries[index]).load()


def dumps(value: Any) -> bytes:
    """Pickle, with classes of the main script and the like by value."""
    from ray import cloudpickle

    return cloudpickle.dumps(value)
