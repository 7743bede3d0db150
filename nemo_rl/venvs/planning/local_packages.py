"""Packages that are installed from a directory on this machine, and the digest of the files that affect a venv.

A venv holds a link to the code of an editable package. Its digest covers its path, the metadata that affect the link
and the scripts, and the package's `tool.uv.cache-keys`. So a change of its code, or of the dependencies of an extra,
does not rebuild the venv. The digest of any other local package covers all its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from nemo_rl import settings
from nemo_rl.venvs.planning.relocation import located

_METADATA_FILES = ("pyproject.toml", "setup.py", "setup.cfg")
_PROJECT_KEYS = ("name", "version", "dynamic", "scripts", "gui-scripts", "entry-points")
# Tables of tools that do not affect a build.
_OTHER_TOOLS = frozenset(
    (
        "bandit",
        "black",
        "coverage",
        "isort",
        "mypy",
        "nemo-rl",
        "pixi",
        "pylint",
        "pyright",
        "pytest",
        "ruff",
        "towncrier",
        "tox",
    )
)
# Directories that no build reads. Virtual environments, caches of tools and directories of this engine are recognized
# by a file in them, because a package may have any name, such as `venv` or `dist`.
_SKIPPED_NAMES = frozenset(
    (".git", ".hg", ".svn", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".tox")
)
_SKIPPED_IF_HOLDING = ("pyvenv.cfg", "CACHEDIR.TAG", ".store")
# What setuptools writes into the directory that it builds.
_BUILD_OUTPUT = re.compile(r"build/(lib|lib\..*|bdist\..*|temp\..*)|(.*/)?[^/]+\.egg-info")


@dataclass(frozen=True)
class LocalPackage:
    """Identifies a local package.

    Attributes:
        path: its directory on the node that planned, usually the driver's.
        editable: whether the venv links to the directory.
        digest: digest of the files and metadata that affect the venv.
    """

    path: str
    editable: bool
    digest: str

    @staticmethod
    def read(path: str, *, editable: bool) -> LocalPackage:
        """Read the package's directory on this node."""
        root = located(path)
        content = [*_metadata(root), *_cache_keys(root), *(() if editable else _tree(root))]
        return LocalPackage(path, editable, _digest(content))

    def identity(self) -> list[Any]:
        return [self.path, self.editable, self.digest]


def file_digest(path: Path) -> str | None:
    """Return the sha256 of a file; None if there is no such file, or if it cannot be read by this user."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return None


def metadata_digest(root: Path) -> str:
    """Return a digest of what the lock's entry for the package in `root` depends on."""
    return _digest([*(file_digest(root / name) for name in _METADATA_FILES), *_cache_keys(root)])


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _metadata(root: Path) -> list[Any]:
    try:
        pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        pyproject = {}
    except ValueError:  # invalid TOML, which uv will report; until then any change counts
        return [file_digest(root / name) for name in _METADATA_FILES]
    project = pyproject.get("project", {})
    tools = {name: table for name, table in pyproject.get("tool", {}).items() if name not in _OTHER_TOOLS | {"uv"}}
    return [
        pyproject.get("build-system"),
        {key: project[key] for key in _PROJECT_KEYS if key in project},
        json.dumps(tools, sort_keys=True, default=str),
        pyproject.get("tool", {}).get("uv", {}).get("build-backend"),
        *(file_digest(root / name) for name in _METADATA_FILES[1:]),
    ]


def _cache_keys(root: Path) -> Iterator[Any]:
    """Yield the state of what the package names in `tool.uv.cache-keys`: files, directories, variables and git."""
    try:
        tool = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("tool", {})
    except (OSError, ValueError):
        return
    for key in tool.get("uv", {}).get("cache-keys", []):
        key = {"file": key} if isinstance(key, str) else key
        if "file" in key:
            files = {file for text in _expanded(key["file"]) for file in glob(text, root_dir=root, recursive=True)}
            # `_metadata` decides which parts of the metadata files count.
            yield from ([file, file_digest(root / file)] for file in sorted(files.difference(_METADATA_FILES)))
        elif "dir" in key:
            yield [key["dir"], (root / key["dir"]).is_dir()]
        elif "env" in key:
            yield [key["env"], _digest([settings.snapshot().get(key["env"])])]
        elif "git" in key:
            wanted = {"commit": key["git"]} if isinstance(key["git"], bool) else key["git"]
            commands = {"commit": ("rev-parse", "HEAD"), "tags": ("for-each-ref", "refs/tags")}
            yield [_git(root, *command) for name, command in commands.items() if wanted.get(name)]


def _expanded(pattern: str) -> list[str]:
    """Expand the braces of a pattern, such as `*.{c,h}`, which uv accepts and `glob` does not."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    options = match[1].split(",")
    return [text for one in options for text in _expanded(pattern[: match.start()] + one + pattern[match.end() :])]


def _git(root: Path, *arguments: str) -> str | None:
    """Return the output of git; None without git or a repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _tree(root: Path, directory: Path | None = None, around: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yield every file below `root` that a build may read, with its digest and whether it is executable."""
    directory = directory or root
    real = os.path.realpath(directory)
    if real in around:
        return  # a link to a directory around it
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir():
            if not _is_skipped(path, root):
                yield from _tree(root, path, (*around, real))
        elif entry.is_file() or entry.is_symlink():
            yield [str(path.relative_to(root)), file_digest(path), os.access(path, os.X_OK)]


def _is_skipped(directory: Path, root: Path) -> bool:
    if directory.name in _SKIPPED_NAMES or any(os.path.lexists(directory / name) for name in _SKIPPED_IF_HOLDING):
        return True
    is_output = _BUILD_OUTPUT.fullmatch(str(directory.relative_to(root))) is not None
    return is_output and not (root / "build" / "__init__.py").exists()
