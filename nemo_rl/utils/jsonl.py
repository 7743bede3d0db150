"""Files with one JSON object per line that survive the death of their writer at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def append_text(path: Path, text: str) -> None:
    """Append whole lines, in one write where the system allows it.

    Lines of several writers do not mix, and a killed writer leaves at most one incomplete line at the end. Such a line
    is ended first, so that it spoils no other. An `OSError` names the file.
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
    """The objects of the file, in order. Lines that hold no whole object are skipped; no file reads as an empty one."""
    return [record for _, record in _lines(path) if record is not None]


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> int:
    """Drop, in one atomic step, the lines whose object is not wanted and those that hold none.

    Returns:
        How many lines were dropped. The others stay as they are, byte for byte.
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
    """Every line that is not empty, with its object."""
    if not path.exists():
        return []
    found: list[tuple[str, dict[str, Any] | None]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line:
            record = None
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
            found.append((line, record if isinstance(record, dict) else None))
    return found
