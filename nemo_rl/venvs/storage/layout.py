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

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from nemo_rl import settings
from nemo_rl.errors import VenvError

_VENV_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=,-]{0,199}")
DIGEST_PREFIX = 16
UNPACKED_PREFIX = ".nemo_rl-bundle-"  # directories in <venv dir> that a bundle is unpacked into while it is built from


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
