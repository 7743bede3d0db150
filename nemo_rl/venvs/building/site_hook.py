"""The site hook: code that runs whenever an interpreter starts in a venv of the store.

A build writes a module into the venv, and a `.pth` file that imports it. The module

- pins the process to the directory that the venv's name points to at its start: it resolves the link in `sys.prefix`,
  `sys.path` and `sys.executable`, so a later change of the link affects neither the process nor its children;
- takes a lease, so that `prune` and rebuilds do not remove the directory while the process lives;
- in an additive venv, appends the base's packages to `sys.path` and takes a lease on the base;
- if `NEMO_RL_SOURCES` says that a project is at another path than the venv names, imports its editable packages from
  there.
"""

from __future__ import annotations

from pathlib import Path

from nemo_rl.venvs.storage.locks import LEASE_FILE

MODULE = "_nemo_rl_venv"
# `.pth` files are read in the order of their names. With this name, paths of editable packages precede the base's.
PTH_FILE = "zzzz_nemo_rl_venv.pth"

_SOURCE = '''"""Written by nemo_rl.venvs: pins this process to its venv and keeps the venv from being removed."""

import fcntl
import os
import site
import sys

# Base venv, relative to this venv's directory; None for a full venv.
BASE = {base!r}
# Directories whose packages come after this venv's own.
BASE_PATHS = {base_paths!r}
LEASES = []


def _lease(root):
    path = os.path.join(root, {lease!r})
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        LEASES.append(descriptor)
        os.utime(path)
    except OSError:
        pass  # a file system without locks, or a read-only disk, from which nothing is removed


def _pin(known_paths):
    old, root = sys.prefix, os.path.realpath(sys.prefix)
    if root != old:
        def real(path):
            return root + path[len(old):] if path == old or path.startswith(old + os.sep) else path
        sys.prefix, sys.exec_prefix, sys.executable = root, root, real(sys.executable)
        sys.path[:] = [real(path) for path in sys.path]
        known_paths.update([real(path) for path in known_paths])  # or site would add them again
    return root


def _path_here(path, moved):
    for named in sorted(moved, key=len, reverse=True):
        if path == named or path.startswith(named + os.sep):
            return moved[named] + path[len(named):]
    return None


def _follow_sources(directories):
    """Import editable packages from where their projects are here, not from the paths that the venv names."""
    if not os.environ.get("NEMO_RL_SOURCES"):
        return
    import json

    moved = json.loads(os.environ["NEMO_RL_SOURCES"])
    for directory in directories:
        for name in sorted(os.listdir(directory)):
            if name.endswith(".pth"):
                with open(os.path.join(directory, name), encoding="utf-8") as file:
                    lines = [line.strip() for line in file]
                paths = {{line: _path_here(line, moved) for line in lines if _path_here(line, moved) is not None}}
                sys.path[:] = [path for path in sys.path if path not in paths]
                sys.path += paths.values()
    for name, module in list(sys.modules.items()):
        if name.startswith("__editable___"):  # setuptools' finder of a project whose layout a path cannot describe
            for package, path in module.MAPPING.items():
                module.MAPPING[package] = _path_here(path, moved) or path
            for package, paths in getattr(module, "NAMESPACES", {{}}).items():
                module.NAMESPACES[package] = [_path_here(path, moved) or path for path in paths]


def start(known_paths):
    """Called once by the .pth file, with site's set of the paths that it has added."""
    known_paths = set() if known_paths is None else known_paths
    root = _pin(known_paths)
    _lease(root)
    paths = BASE_PATHS
    if BASE is not None:
        base = os.path.realpath(os.path.join(root, BASE))
        _lease(base)
        paths = [os.path.join(base, os.path.relpath(os.path.dirname(os.path.realpath(__file__)), root))]
    _follow_sources([os.path.dirname(os.path.realpath(__file__))])
    for path in paths:
        site.addsitedir(path, known_paths)
    _follow_sources(paths)
'''


# The line runs inside `site.addpackage`. The hook of a base venv does nothing, because the module is imported already.
_PTH = f"import sys; {MODULE!r} in sys.modules or __import__({MODULE!r}).start(locals().get('known_paths'))\n"


def write_site_hook(site_packages: Path, *, base: str | None = None, base_paths: tuple[str, ...] = ()) -> None:
    """Write the hook into a venv.

    Args:
        base: path of the base venv relative to the venv's directory; None without a base venv.
        base_paths: site-packages directories of a base interpreter.
    """
    source = _SOURCE.format(base=base, base_paths=list(base_paths), lease=LEASE_FILE)
    (site_packages / f"{MODULE}.py").write_text(source)
    (site_packages / PTH_FILE).write_text(_PTH)
