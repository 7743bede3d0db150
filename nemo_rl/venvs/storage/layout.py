"""Paths, links and permissions in a venv directory.

::

    <venv dir>/
      <name>               -> .store/<digest16>          a venv's name, such as a worker's FQN
      .store/
        <digest16>         -> <digest16>.<nonce>         published when sealed, repointed by a rebuild
        <digest16>.<nonce>/                              a venv; its path never changes
        <digest16>.lock                                  build lock; holds a description of its holder
        <digest16>.handed-out.lock                       locked by processes that `ensure` has returned the venv to
        .resolved/<key>.json                             resolution of a spec
        .arriving/<digest16>.<key>/                      chunks of a venv that another node sends
      .source/<digest16>/                                source from the driver (`source_sync`)
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
UNPACKED_PREFIX = ".nemo_rl-bundle-"  # of directories in <venv dir> that hold an unpacked bundle during a build
# These variables would make the interpreter or its children load files of another Python.
UNSET_IN_VENV: tuple[str, ...] = ("PYTHONHOME", "PYTHONPATH")
_WRITE_BY_OTHERS = 0o002

_umask_lock = threading.Lock()
_umask_depth = 0
_previous_umask = 0


@dataclass(frozen=True)
class Store:
    """Names the paths of the venvs in one directory. Only `create` creates anything.

    Attributes:
        root: `<venv dir>`.
    """

    root: Path

    @staticmethod
    def default() -> Store:
        return Store(settings.venv_dir())

    def create(self) -> None:
        """Create the venv directory and `.store`, unless they exist. Raises `OSError`."""
        make_generated_directory(self.root)
        self.directory.mkdir(exist_ok=True)

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

    def new_log(self, label: str) -> Path:
        """Return a new path for the log of a build (`label` is its digest) or resolution."""
        return self.logs / f"{label}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(4).hex()}.log"

    def link(self, digest: str) -> Path:
        """Return the stable path of a digest: a link to the directory that holds the venv now."""
        return self.directory / digest[:DIGEST_PREFIX]

    def lock(self, digest: str) -> Path:
        return self.directory / f"{digest[:DIGEST_PREFIX]}.lock"

    def handed_out(self, digest: str) -> Path:
        return self.directory / f"{digest[:DIGEST_PREFIX]}.handed-out.lock"

    def new_directory(self, digest: str) -> Path:
        """Return a path that no other build uses."""
        return self.directory / f"{digest[:DIGEST_PREFIX]}.{os.urandom(4).hex()}"

    def builds(self, digest: str) -> list[Path]:
        """Return every directory of a digest: sealed, replaced, or left behind by a killed builder."""
        pattern = re.compile(re.escape(digest[:DIGEST_PREFIX]) + r"\.[0-9a-f]{8}")
        return [entry for entry in self._entries() if pattern.fullmatch(entry.name)]

    def digests(self) -> list[str]:
        """Return the first 16 digits of every digest that has a directory or a link, sorted."""
        prefixes = {entry.name[:DIGEST_PREFIX] for entry in self._entries()}
        return sorted(prefix for prefix in prefixes if re.fullmatch(r"[0-9a-f]{16}", prefix))

    def _entries(self) -> list[Path]:
        try:
            return sorted(entry for entry in self.directory.iterdir() if not entry.name.endswith(".lock"))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def name_path(self, venv_name: str) -> Path:
        """Return the path of a venv's name. Raises `VenvError` for an invalid name."""
        if not isinstance(venv_name, str) or not _VENV_NAME.fullmatch(venv_name):
            raise VenvError(
                f"{venv_name!r} is not a valid venv name: a name starts with a letter, digit or '_', has at most 200 "
                "characters and holds only letters, digits and '._+@=,-' (as a worker's fully qualified class name)."
            )
        return self.root / venv_name

    def names(self) -> dict[str, str]:
        """Return every venv name with the first 16 digits of the digest that it points to."""
        names: dict[str, str] = {}
        try:
            entries = sorted(self.root.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return names
        for entry in entries:
            if entry.is_symlink():
                target = os.readlink(entry)
                if os.path.dirname(target) == ".store":
                    names[entry.name] = os.path.basename(target)
        return names


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, atomically. Raises `VenvError` if `link` exists and is not a link."""
    try:
        if os.readlink(link) == target:
            return
    except FileNotFoundError:
        pass
    except OSError:
        raise VenvError(
            f"{link} exists and is not a link that nemo_rl created. Move it away, or set another "
            f"{settings.VENV_DIR.name}."
        ) from None
    temporary = link.with_name(f".{link.name[:100]}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    os.symlink(target, temporary)
    try:
        os.replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)


def make_generated_directory(directory: Path) -> None:
    """Create a directory for generated files, unless it exists, with a `.gitignore` that hides it from git."""
    if directory.is_dir():
        return
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError), open(directory / ".gitignore", "x", encoding="utf-8") as file:
        file.write("# Created by nemo_rl.\n*\n")


def remove_tree(path: Path) -> None:
    """Remove a directory tree. Ignores errors, such as files that another process removes at the same time."""
    shutil.rmtree(path, ignore_errors=True)


def activation_env(venv_path: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that make a process and its children run in the venv at `venv_path`.

    They are `VIRTUAL_ENV`, `PATH` with the venv's `bin` first, `PYTHONNOUSERSITE`, and each name in `UNSET_IN_VENV` as
    an empty string, which Python treats as unset.

    Args:
        environment: the variables to start from; default: those of this process.

    Example:
        >>> activation_env("/venvs/a", {"PATH": "/usr/bin"})["PATH"]
        '/venvs/a/bin:/usr/bin'
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
    """Set the umask so that only owner and group may write to files that this process and its children create.

    Everybody who can read a venv runs its code, so others must not be able to change it. The umask belongs to the
    process: the first thread that enters such a block sets it, and the last thread that leaves restores it.
    """
    global _umask_depth, _previous_umask
    with _umask_lock:
        if _umask_depth == 0:
            # Setting the umask is the only way to read it. Other threads may create files at this moment.
            _previous_umask = os.umask(0o022)
            os.umask(_previous_umask | _WRITE_BY_OTHERS)
        _umask_depth += 1
    try:
        yield
    finally:
        with _umask_lock:
            _umask_depth -= 1
            if _umask_depth == 0:
                os.umask(_previous_umask)
