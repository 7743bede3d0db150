"""The variables of a process that runs in a venv."""

from __future__ import annotations

import os
from collections.abc import Mapping

from nemo_rl import settings

# Would make the interpreter, or a child of it, load another Python's files.
UNSET_IN_VENV: tuple[str, ...] = ("PYTHONHOME", "PYTHONPATH")


def activation_env(venv_path: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What to set so that a process and its children run in the venv at `venv_path`.

    `VIRTUAL_ENV`, `PATH` (of `environment`, default: this process's) with the venv's `bin` first, and
    `PYTHONNOUSERSITE`. The names in `UNSET_IN_VENV` must be removed; they are in the result as empty strings,
    which Python takes as unset.
    """
    environment = settings.snapshot() if environment is None else environment
    root = os.path.abspath(venv_path)
    scripts = os.path.join(root, "bin")
    old_scripts = os.path.join(environment["VIRTUAL_ENV"], "bin") if environment.get("VIRTUAL_ENV") else None
    rest = [
        entry
        for entry in environment.get("PATH", os.defpath).split(os.pathsep)
        if entry not in (scripts, old_scripts, "")
    ]
    return {
        "VIRTUAL_ENV": root,
        "PATH": os.pathsep.join([scripts, *rest]),
        "PYTHONNOUSERSITE": "1",
        **dict.fromkeys(UNSET_IN_VENV, ""),
    }
