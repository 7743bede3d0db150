"""Add bytecode to a new venv: reuse it from venvs that hold the same source files, and compile the rest.

Compiling is by far the slowest part of a build, and uv's cache holds no bytecode. But uv links the files of its cache
into every venv, so an earlier venv, or the driver's, already has bytecode of most source files. Python accepts bytecode
whose header holds its magic number and the source's modification time and size (PEP 552). Bytecode is reused only if
its header is valid for the donor's source and both sources are the same file or have equal content.
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
    """Counts the source files whose bytecode was reused or compiled."""

    reused: int = 0
    compiled: int = 0

    def __str__(self) -> str:
        return f"{self.reused} reused, {self.compiled} compiled"


def add_bytecode(
    site_packages: Path, python: Path, donors: Sequence[Path], *, log: BuildLog | None = None
) -> BytecodeReport:
    """Add bytecode for every source file below `site_packages`.

    A source that does not compile (a template, a test of syntax errors) gets no bytecode, as with uv.

    Args:
        python: the venv's interpreter.
        donors: site-packages directories of the same Python version, tried in this order.
    """
    report = BytecodeReport()
    missing: list[str] = []
    for directory, relative, sources in _source_directories(site_packages):
        remaining = sources
        for donor in donors:
            if not remaining:
                break
            remaining = _reuse(directory, donor / relative, remaining)
        report.reused += len(sources) - len(remaining)
        missing += [os.path.join(directory, name) for name in remaining]
    if missing:
        _compile(python, missing, log)
    report.compiled = len(missing)
    return report


def _source_directories(root: Path) -> list[tuple[str, str, list[str]]]:
    """Return (directory, path relative to `root`, names of source files) of each directory with source files."""
    directories = []
    for directory, names, files in os.walk(root):
        if _CACHE in names:
            names.remove(_CACHE)
        sources = [name for name in files if name.endswith(".py")]
        if sources:
            directories.append((directory, os.path.relpath(directory, root), sources))
    return directories


def _reuse(directory: str, donor: Path, sources: list[str]) -> list[str]:
    """Reuse the donor's bytecode for `sources` in `directory`; return the sources that still need bytecode."""
    suffix = f".{sys.implementation.cache_tag}.pyc"
    try:
        available = set(os.listdir(donor / _CACHE))
    except OSError:
        return sources
    cache = os.path.join(directory, _CACHE)
    os.makedirs(cache, exist_ok=True)
    remaining = []
    for name in sources:
        bytecode = name[:-3] + suffix
        if bytecode not in available or not _link(
            os.path.join(directory, name),
            os.path.join(donor, name),
            os.path.join(donor, _CACHE, bytecode),
            os.path.join(cache, bytecode),
        ):
            remaining.append(name)
    return remaining


def _link(source: str, donor_source: str, donor_bytecode: str, target: str) -> bool:
    """Link or copy the donor's bytecode to `target`; return False if it is not valid for `source`."""
    try:
        status, donor_status = os.stat(source), os.stat(donor_source)
        if not os.path.samestat(status, donor_status) and (
            status.st_size != donor_status.st_size or not filecmp.cmp(source, donor_source, shallow=False)
        ):
            return False
        with open(donor_bytecode, "rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or not _is_valid(header, donor_status):
                return False
            if _is_valid(header, status):
                try:
                    os.link(donor_bytecode, target)
                    return True
                except FileExistsError:
                    return True
                except OSError:
                    pass  # another file system, or too many links: copy
            # The content is equal, but not the time. The header must hold the time of `source`.
            magic, flags, _, size = _HEADER.unpack(header)
            with open(target, "wb") as copy:
                copy.write(_HEADER.pack(magic, flags, int(status.st_mtime) & 0xFFFFFFFF, size) + file.read())
        return True
    except FileNotFoundError:
        return False


def _is_valid(header: bytes, source: os.stat_result) -> bool:
    """Return whether Python accepts bytecode with this header for this source. Hash-based bytecode is not supported."""
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
    # compileall exits with 1 if a source does not compile, which is not an error here.
    script = "import compileall, sys; compileall.main(); sys.exit(0)"
    command = [str(python), "-I", "-S", "-c", script, "-qq", "-j", str(processes), "-i", str(listing)]
    try:
        run_command(command, what="Compiling bytecode", env=uv_environment(), log=log)
    finally:
        listing.unlink(missing_ok=True)
