"""Bytecode for a new venv: carried over from venvs that hold the same files, compiled only where there is none.

Compiling is by far the slowest part of a build, and uv's cache holds no bytecode. But uv links the files of its cache
into every venv, so most sources of a new venv are also in an earlier one, or in the driver's own, with their bytecode.
Python accepts bytecode whose header names its own magic number and the source's modification time and size; it is
carried only when that holds for the new source and the two sources are the same file, or hold the same bytes.
"""

from __future__ import annotations

import filecmp
import importlib.util
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_rl.venvs.uv import BuildLog, run_command, uv_environment

_HEADER = struct.Struct("<4sIII")  # magic, flags, mtime, size: PEP 552
_CACHE = "__pycache__"


@dataclass
class BytecodeReport:
    """How many sources got their bytecode from where."""

    carried: int = 0
    compiled: int = 0

    def __str__(self) -> str:
        return f"{self.carried} carried over, {self.compiled} compiled"


def add_bytecode(
    site_packages: Path, python: Path, donors: Sequence[Path], *, log: BuildLog | None = None
) -> BytecodeReport:
    """Give every source below `site_packages` its bytecode.

    `donors` are site-packages directories of the same Python version, best first. A source that does not compile (a
    template, a test of syntax errors) stays without, as with uv.
    """
    report = BytecodeReport()
    missing: list[str] = []
    for directory, relative, sources in _source_directories(site_packages):
        left = sources
        for donor in donors:
            if not left:
                break
            left = _carry(directory, donor / relative, left)
        report.carried += len(sources) - len(left)
        missing += [os.path.join(directory, name) for name in left]
    if missing:
        _compile(python, missing, log)
    report.compiled = len(missing)
    return report


def _source_directories(root: Path) -> list[tuple[str, str, list[str]]]:
    """(directory, path relative to `root`, sources without bytecode)."""
    found = []
    for directory, names, files in os.walk(root):
        if _CACHE in names:
            names.remove(_CACHE)
        sources = [name for name in files if name.endswith(".py")]
        if sources:
            found.append((directory, os.path.relpath(directory, root), sources))
    return found


def _carry(directory: str, donor: Path, sources: list[str]) -> list[str]:
    """Carry bytecode from `donor` for `sources` of `directory`; return the sources that it could not serve."""
    suffix = f".{sys.implementation.cache_tag}.pyc"
    try:
        available = set(os.listdir(donor / _CACHE))
    except OSError:
        return sources
    cache = os.path.join(directory, _CACHE)
    os.makedirs(cache, exist_ok=True)
    left = []
    for name in sources:
        bytecode = name[:-3] + suffix
        source, twin = os.path.join(directory, name), os.path.join(donor, name)
        given = os.path.join(donor, _CACHE, bytecode)
        if bytecode not in available or not _link(source, twin, given, os.path.join(cache, bytecode)):
            left.append(name)
    return left


def _link(source: str, twin: str, given: str, target: str) -> bool:
    try:
        status, other = os.stat(source), os.stat(twin)
        same = os.path.samestat(status, other)
        if not same and (status.st_size != other.st_size or not filecmp.cmp(source, twin, shallow=False)):
            return False
        with open(given, "rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or not _valid(header, other):
                return False
            if _valid(header, status):
                try:
                    os.link(given, target)
                    return True
                except FileExistsError:
                    return True
                except OSError:
                    pass  # another file system, or too many links: copy
            # The same bytes with another time: the header must name the time of the source it lies beside.
            magic, flags, _, size = _HEADER.unpack(header)
            with open(target, "wb") as copy:
                copy.write(_HEADER.pack(magic, flags, int(status.st_mtime) & 0xFFFFFFFF, size) + file.read())
        return True
    except FileNotFoundError:
        return False


def _valid(header: bytes, source: os.stat_result) -> bool:
    """Whether Python would accept bytecode with this header for this source (time-stamped bytecode only)."""
    magic, flags, mtime, size = _HEADER.unpack(header)
    return (
        magic == importlib.util.MAGIC_NUMBER
        and flags == 0
        and mtime == int(source.st_mtime) & 0xFFFFFFFF
        and size == source.st_size & 0xFFFFFFFF
    )


def _compile(python: Path, sources: list[str], log: BuildLog | None) -> None:
    # A process costs about as much as compiling 30 files.
    processes = min(len(os.sched_getaffinity(0)), 1 + len(sources) // 30)
    listing = python.parent.parent / ".nemo_rl_compile"
    listing.write_text("\n".join(sources))
    # compileall ends with 1 when a source does not compile; that is no failure here.
    script = "import compileall, sys; compileall.main(); sys.exit(0)"
    command = [str(python), "-I", "-S", "-c", script, "-qq", "-j", str(processes), "-i", str(listing)]
    try:
        run_command(command, what="Compiling bytecode", env=uv_environment(), log=log)
    finally:
        listing.unlink(missing_ok=True)
