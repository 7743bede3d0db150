"""Packages that are installed from a directory on this machine, and the digest of the files that affect a venv.

A venv holds a link to the code of an editable package. Its digest covers its path and the metadata that affect the link
and the scripts, so a change of its code, or of the dependencies of an extra, does not rebuild the venv. The digest of
any other local package covers all its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_VERSION_CONTROL = (".git", ".hg", ".svn")
_CACHES = ("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".tox", "node_modules")
_SKIPPED_DIRECTORIES = frozenset((*_VERSION_CONTROL, *_CACHES, ".venv", "venv", "venvs", "build", "dist"))


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
        content = _metadata(root) if editable else [*_metadata(root), *_tree(root)]
        return LocalPackage(path, editable, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())

    def identity(self) -> list[Any]:
        return [self.path, self.editable, self.digest]

    def metadata_files(self) -> list[Path]:
        """Return the files that a lock's entry for this package depends on."""
        return [located(self.path) / name for name in _METADATA_FILES]


def file_digest(path: Path) -> str | None:
    """Return the sha256 of a file; None if there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


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


def _tree(root: Path) -> Iterator[tuple[str, str | None]]:
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _SKIPPED_DIRECTORIES and not name.endswith(".egg-info"))
        for file in sorted(files):
            path = Path(directory, file)
            if path.suffix != ".pyc":
                yield str(path.relative_to(root)), file_digest(path)
