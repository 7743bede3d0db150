"""Where things are in a venv directory.

::

    <venv dir>/
      <name>               -> .store/<digest16>          a name, such as a worker's FQN
      .store/
        <digest16>         -> <digest16>.<nonce>         published when sealed, repointed by a rebuild
        <digest16>.<nonce>/                              a venv; its path never changes
        <digest16>.lock                                  build lock; says who holds it
        .resolved/<key>.json                             what a spec resolved to
        .arriving/<digest16>.<key>/                      chunks of a venv that comes from another node
      .source/<digest16>/                                source that came from the driver (`source_sync`)
      .logs/<digest16>-<time>-<nonce>.log                full output of a build
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_rl import settings
from nemo_rl.errors import VenvError

_VENV_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=,-]{0,199}")
DIGEST_PREFIX = 16
UNPACKED_PREFIX = ".nemo_rl-bundle-"  # directories in <venv dir> that a bundle is unpacked into while it is built from
_OTHERS_MAY_WRITE = 0o002

_lock = threading.Lock()
_depth = 0
_before = 0
# Would make the interpreter, or a child of it, load another Python's files.
UNSET_IN_VENV: tuple[str, ...] = ("PYTHONHOME", "PYTHONPATH")


@dataclass(frozen=True)
class Store:
    """The venvs under one directory. `root` is `<venv dir>`; nothing is created until something is written."""

    root: Path

    @staticmethod
    def default() -> Store:
        return Store(settings.venv_dir())

    @property
    def directory(self) -> Path:
        return self.root / ".store"

    @property
    def logs(self) -> Path:
        return self.root / ".logs"

    @property
    def resolved(self) -> Path:
        return self.directory / ".resolved"

    @property
    def arriving(self) -> Path:
        return self.directory / ".arriving"

    def new_log(self, what: str) -> Path:
        """A path for the output of one build (`what` is its digest) or resolution."""
        return self.logs / f"{what}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(4).hex()}.log"

    def link(self, digest: str) -> Path:
        """The stable path of a digest: a link to the venv directory that holds it now."""
        return self.directory / digest[:DIGEST_PREFIX]

    def lock(self, digest: str) -> Path:
        return self.directory / f"{digest[:DIGEST_PREFIX]}.lock"

    def new_directory(self, digest: str) -> Path:
        """A path that no other build has used or will use."""
        return self.directory / f"{digest[:DIGEST_PREFIX]}.{os.urandom(4).hex()}"

    def builds(self, digest: str) -> list[Path]:
        """Every venv directory of a digest: sealed, replaced, or left by a builder that died."""
        pattern = re.compile(re.escape(digest[:DIGEST_PREFIX]) + r"\.[0-9a-f]{8}")
        return [entry for entry in self._entries() if pattern.fullmatch(entry.name)]

    def digests(self) -> list[str]:
        """The (shortened) digests that have a directory or a link."""
        found = {entry.name[:DIGEST_PREFIX] for entry in self._entries()}
        return sorted(name for name in found if re.fullmatch(r"[0-9a-f]{16}", name))

    def _entries(self) -> list[Path]:
        try:
            return sorted(entry for entry in self.directory.iterdir() if not entry.name.endswith(".lock"))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def name_path(self, venv_name: str) -> Path:
        """The path of a venv's name. Raises `VenvError` for a name that cannot be one."""
        if not isinstance(venv_name, str) or not _VENV_NAME.fullmatch(venv_name):
            raise VenvError(
                f"{venv_name!r} cannot be the name of a venv: it must start with a letter, digit or '_' and hold only "
                "letters, digits and any of '._+@=,-' (a worker's fully qualified class name fits)."
            )
        return self.root / venv_name

    def names(self) -> dict[str, str]:
        """Every venv name and the (shortened) digest that it points to."""
        found: dict[str, str] = {}
        try:
            entries = sorted(self.root.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return found
        for entry in entries:
            if entry.is_symlink():
                target = os.readlink(entry)
                if os.path.dirname(target) == ".store":
                    found[entry.name] = os.path.basename(target)
        return found


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` in one step. Raises `VenvError` when something else is there."""
    try:
        if os.readlink(link) == target:
            return
    except FileNotFoundError:
        pass
    except OSError:
        raise VenvError(
            f"{link} exists and is not a link that nemo_rl made. Move it away, or choose another "
            f"{settings.VENV_DIR.name}."
        ) from None
    temporary = link.with_name(f".{link.name[:100]}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    os.symlink(target, temporary)
    try:
        os.replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory tree; what another process removes or writes meanwhile does not matter."""
    shutil.rmtree(path, ignore_errors=True)


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


@contextlib.contextmanager
def not_writable_by_others() -> Iterator[None]:
    """While any thread is in such a block, what this process and its children create is not writable by others.

    The umask belongs to the process, so the first to enter sets it and the last to leave puts back what was there.
    """
    global _depth, _before
    with _lock:
        if _depth == 0:
            _before = os.umask(0o022)  # the only way to read it; other threads may create files at this moment
            os.umask(_before | _OTHERS_MAY_WRITE)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                os.umask(_before)
