"""Translate between the paths of projects that plans and venvs name, and their paths on this node.

They differ on a node that received the driver's source, where the named path is the driver's, and in a submitted job,
where it is `/uploaded/<project>`. Venvs name the same path everywhere, because another node, or a later job, that uses
the venv may have the project there. The site hook reads the same variable (`NEMO_RL_SOURCES`) when a worker starts.
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

_MAX_BYTES = 2**16  # of a file that names a project's path: a `.pth` file, or metadata that uv writes


def located(path: str | os.PathLike[str]) -> Path:
    """Return where the driver's `path` is on this node."""
    return _replace_root(Path(path), relocated_roots())


def original(path: str | os.PathLike[str]) -> Path:
    """Return the driver's path of a path on this node: the inverse of `located`."""
    return _replace_root(Path(path), {target: root for root, target in relocated_roots().items()})


def restore_original_paths(site_packages: Path) -> None:
    """Replace this node's project paths by the driver's in the files of a new venv, and update each `RECORD`."""
    originals = {os.fsencode(target): os.fsencode(root) for root, target in relocated_roots().items()}
    if not originals:
        return
    for record in site_packages.glob("*.dist-info/RECORD"):
        if (record.parent / "direct_url.json").exists():
            _restore_distribution(record, site_packages, originals)


def _restore_distribution(record: Path, site_packages: Path, originals: dict[bytes, bytes]) -> None:
    rows = list(csv.reader(io.StringIO(record.read_text(encoding="utf-8"))))
    for row in rows:
        path = site_packages / row[0]
        if not path.is_file() or path.stat().st_size > _MAX_BYTES or path == record:
            continue
        content = before = path.read_bytes()
        for target, root in originals.items():
            content = content.replace(target, root)
        if content != before:
            _rewrite(path, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            row[1:] = [f"sha256={digest}", str(len(content))]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _rewrite(record, text.getvalue().encode())


def _rewrite(path: Path, content: bytes) -> None:
    mode = path.stat().st_mode
    path.unlink()  # it may be a hard link into uv's cache
    path.write_bytes(content)
    path.chmod(mode)


def relocated_roots() -> dict[str, str]:
    """Return the path that plans and venvs name -> the path here, of every project that has another path here."""
    return json.loads(settings.SOURCES.get() or "{}")


def _replace_root(path: Path, roots: dict[str, str]) -> Path:
    for root in sorted(roots, key=len, reverse=True):
        if path.is_relative_to(root):
            return Path(roots[root]) / path.relative_to(root)
    return path
