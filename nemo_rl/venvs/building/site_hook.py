"""What every venv of the store runs when an interpreter starts in it.

A module and a `.pth` file that imports it are written into the venv. They

- pin the process to the directory that the venv's name pointed to when the process started: `sys.prefix`, `sys.path`
  and `sys.executable` leave the link behind, so that repointing the name changes no running process and none of its
  children;
- hold a lease, so that `prune` and rebuilds leave the directory alone as long as the process lives;
- of an additive venv, put the base's packages after its own, and lease the base too.
"""

from __future__ import annotations

from pathlib import Path

from nemo_rl.venvs.storage.locks import LEASE_FILE

MODULE = "_nemo_rl_venv"
# `.pth` files are read in the order of their names: paths of editable packages come before the base's.
PTH_FILE = "zzzz_nemo_rl_venv.pth"

_SOURCE = '''"""Written by nemo_rl.venvs: pins this process to its venv, which is then not removed while it runs."""

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
        pass  # no locks here, or a read-only disk: nothing is removed from that


def _pin(known_paths):
    old, root = sys.prefix, os.path.realpath(sys.prefix)
    if root != old:
        def real(path):
            return root + path[len(old):] if path == old or path.startswith(old + os.sep) else path
        sys.prefix, sys.exec_prefix, sys.executable = root, root, real(sys.executable)
        sys.path[:] = [real(path) for path in sys.path]
        known_paths.update([real(path) for path in known_paths])  # or site would add them again
    return root


def start(known_paths):
    """Called once, by the .pth file, with the set in which site keeps the paths that it has added."""
    known_paths = set() if known_paths is None else known_paths
    root = _pin(known_paths)
    _lease(root)
    paths = BASE_PATHS
    if BASE is not None:
        base = os.path.realpath(os.path.join(root, BASE))
        _lease(base)
        paths = [os.path.join(base, os.path.relpath(os.path.dirname(os.path.realpath(__file__)), root))]
    for path in paths:
        site.addsitedir(path, known_paths)
'''


# The line runs inside `site.addpackage`. The hook of a base venv finds the module imported and does nothing.
_PTH = f"import sys; {MODULE!r} in sys.modules or __import__({MODULE!r}).start(locals().get('known_paths'))\n"


def write_site_hook(site_packages: Path, *, base: str | None = None, base_paths: tuple[str, ...] = ()) -> None:
    """Write the hook into a venv's site-packages; `base` is the base venv's path relative to the venv's directory."""
    source = _SOURCE.format(base=base, base_paths=list(base_paths), lease=LEASE_FILE)
    (site_packages / f"{MODULE}.py").write_text(source)
    (site_packages / PTH_FILE).write_text(_PTH)
