"""Search running processes. A process that ends during the search is skipped."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def command_line(process: psutil.Process) -> str:
    """Return the arguments of `process`, or the title that it has set; empty if it has ended or is a zombie."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def running(text: str, among: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return those of `among` that are running and have `text` in their command line."""
    return [process for process in among if text in command_line(process)]
