"""Reads and appends JSONL files that remain readable if a writer is killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def append_text(path: Path, text: str) -> None:
    """Append complete lines, with a single write if the system allows it.

    The lines of several writers do not mix. A killed writer leaves at most one incomplete line at the end of the file,
    which the next call terminates with a newline. An `OSError` names the file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            text = "\n" + text
        data = memoryview(text.encode("utf-8", errors="replace"))
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file in order. Lines without a complete object are skipped; a missing file has none."""
    return [record for _, record in _lines(path) if record is not None]


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what `read_jsonl` returns, with one line in memory at a time."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from (record for line in file if (record := _record(line)) is not None)


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> int:
    """Remove atomically the lines whose object is not wanted, and those without a complete object.

    Args:
        path: the file.
        wanted: returns whether to keep an object's line.

    Returns:
        The number of lines that were removed. The other lines are unchanged.
    """
    lines = _lines(path)
    kept = [line for line, record in lines if record is not None and wanted(record)]
    if len(kept) == len(lines):
        return 0
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return len(lines) - len(kept)


def _lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Return every line that is not empty, with its object."""
    if not path.exists():
        return []
    lines: list[tuple[str, dict[str, Any] | None]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line:
            lines.append((line, _record(line)))
    return lines


def _record(line: str) -> dict[str, Any] | None:
    record = None
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
    return record if isinstance(record, dict) else None
