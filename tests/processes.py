"""Which processes run what. They come and go while one looks: one that has just ended is no error but runs nothing."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def command_line(process: psutil.Process) -> str:
    """The arguments of `process`, or its title where it has set one; empty once it has ended, as a zombie too."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def running(text: str, among: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of `among` that still run and have `text` in their command line."""
    return [process for process in among if text in command_line(process)]
