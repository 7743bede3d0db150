"""Console scripts of a base venv, for the additive venvs over it: they must run with the additive venv's packages."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_OWN = ("python", "activate", "deactivate", "pydoc", "pip")
_HEAD_BYTES = 1024


def add_base_scripts(scripts: Path, base_scripts: Path) -> None:
    """Give `scripts` (an additive venv's `bin`) what is in `base_scripts` and not yet in it.

    A script that starts with the base's interpreter is copied to start with this venv's; other programs are linked.
    """
    for entry in sorted(base_scripts.iterdir()) if base_scripts.is_dir() else ():
        target = scripts / entry.name
        if entry.name.startswith(_OWN) or not entry.is_file() or os.path.lexists(target):
            continue
        with entry.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            rest = file.read() if head.startswith(b"#!") else b""
        interpreters = [os.fsencode(path / "python") for path in {base_scripts, base_scripts.resolve()}]
        if head.startswith(b"#!") and any(interpreter in head for interpreter in interpreters):
            for interpreter in interpreters:
                head = head.replace(interpreter, os.fsencode(scripts / "python"))
            target.write_bytes(head + rest)
            shutil.copymode(entry, target)
        else:
            target.symlink_to(entry)
