"""Projects whose source came from the driver to this node: they are not where plans and venvs say that they are.

A plan names the driver's paths, and so must a venv that is built here: it may be given to nodes, or be used by later
jobs, that have the project in its own place.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
from pathlib import Path

from nemo_rl import settings

_MAX_BYTES = 2**16  # of a link to a project, or of what uv notes about it


def located(path: str | os.PathLike[str]) -> Path:
    """Where a directory of a project is on this node."""
    return _replaced(Path(path), _moved())


def original(path: str | os.PathLike[str]) -> Path:
    """The reverse of `located`."""
    return _replaced(Path(path), {target: root for root, target in _moved().items()})


def name_originals(site_packages: Path) -> None:
    """Let the packages in a new venv name the projects' own places, in files and in `RECORD`."""
    moved = {os.fsencode(target): os.fsencode(root) for root, target in _moved().items()}
    if not moved:
        return
    for record in site_packages.glob("*.dist-info/RECORD"):
        if (record.parent / "direct_url.json").exists():
            _name_originals_of(record, site_packages, moved)


def _name_originals_of(record: Path, site_packages: Path, moved: dict[bytes, bytes]) -> None:
    rows = list(csv.reader(record.read_text(encoding="utf-8").splitlines()))
    for row in rows:
        path = site_packages / row[0]
        if not path.is_file() or path.stat().st_size > _MAX_BYTES or path == record:
            continue
        content = before = path.read_bytes()
        for target, root in moved.items():
            content = content.replace(target, root)
        if content != before:
            _rewrite(path, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            row[1:] = [f"sha256={digest}", str(len(content))]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    _rewrite(record, written.getvalue().encode())


def _rewrite(path: Path, content: bytes) -> None:
    mode = path.stat().st_mode
    path.unlink()  # it may be linked from uv's cache
    path.write_bytes(content)
    path.chmod(mode)


def _moved() -> dict[str, str]:
    return json.loads(settings.SOURCES.get() or "{}")


def _replaced(path: Path, moved: dict[str, str]) -> Path:
    for root in sorted(moved, key=len, reverse=True):
        if path.is_relative_to(root):
            return Path(moved[root]) / path.relative_to(root)
    return path
