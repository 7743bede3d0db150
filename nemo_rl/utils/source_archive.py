"""Which files of a working directory a submitted job gets, how large they are, and the archive of exactly those.

git answers both questions, so that a pattern means what it means in `.gitignore`: tracked files are taken as they are
on disk now, and with them new Python files, which the job would run here as well; the user's `--exclude` patterns are
taken out again. What else is new may be data, results or a secret, and stays unless it is asked for. A directory that
is in no repository is asked in the same way, through an empty repository beside it.

The archive is a function of names, contents and executable bits alone: the same sources have the same name on the
cluster and are uploaded once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_rl import settings
from nemo_rl.errors import ConfigError

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold
_CODE = ".py"
# Without a repository there is no .gitignore to rely on.
_NEVER = (".git/", ".venv/", "venvs/", "__pycache__/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/")


@dataclass(frozen=True)
class SourceFile:
    """One file: its path below the root, with `/`, and its size."""

    path: str
    num_bytes: int


@dataclass(frozen=True)
class SourceTree:
    """The files of a directory that travel.

    Attributes:
        root: the directory.
        files: sorted by path.
        untracked: files that git neither tracks nor ignores, which stay behind.
        commit: of the repository, with `+changes` when what travels differs from it; None outside of one.
    """

    root: Path
    files: tuple[SourceFile, ...]
    untracked: tuple[str, ...]
    commit: str | None

    @property
    def num_bytes(self) -> int:
        """Of all files, before compression."""
        return sum(file.num_bytes for file in self.files)

    def largest(self, count: int) -> list[SourceFile]:
        """The largest files, largest first."""
        return sorted(self.files, key=lambda file: (-file.num_bytes, file.path))[:count]


def collect(
    root: Path, excludes: Sequence[str] = (), *, include_untracked: bool = False, leave_out_links: bool = False
) -> SourceTree:
    """The files of `root` that git tracks and new Python files, less `excludes`; what git ignores never.

    With `include_untracked` also all other new files.

    Raises:
        ConfigError: no such directory, no file left, git missing, or a link that leads out of the directory (with
            `leave_out_links` those are left out instead).
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        raise ConfigError(f"the working directory {root} does not exist.")
    with _git_for(root) as git:
        chosen = set(git.names("--cached"))
        others = set(git.names("--others", "--exclude-standard"))
        new = {name for name in others if include_untracked or not git.is_repository or name.endswith(_CODE)}
        chosen, others = chosen | new, others - new
        if excludes:
            patterns = [word for pattern in excludes for word in ("-x", pattern)]
            excluded = set(git.names("--cached", "--ignored", *patterns))
            excluded |= set(git.names("--others", "--ignored", *patterns))
            chosen, others = chosen - excluded, others - excluded
        commit = git.commit(has_new_files=bool(new & chosen))
    files = [file for name in sorted(chosen) for file in _files_at(root, name, excludes, leave_out_links)]
    if not files:
        raise ConfigError(f"{root} has no file to upload: git tracks none that --exclude leaves. Try --untracked.")
    return SourceTree(root, tuple(files), tuple(sorted(others)), commit)


def write_zip(tree: SourceTree, target: Path, *, prefix: str = "") -> None:
    """Write the files into a zip, each below `prefix`. Equal sources make equal bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in tree.files:
            path = tree.root / file.path
            entry = zipfile.ZipInfo(prefix + file.path, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(entry, path.read_bytes())


def unpack_zip(archive: Path, target: Path) -> None:
    """Unpack a zip that somebody else made. Raises `ConfigError`, and writes nothing, when an entry would lead out."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                parts = entry.filename.replace("\\", "/").split("/")
                is_link = (entry.external_attr >> 16) & 0o170000 == 0o120000
                if entry.filename.startswith("/") or ".." in parts or ":" in parts[0] or is_link:
                    raise ConfigError(f"{archive} is not unpacked: its entry {entry.filename!r} would lead out of it.")
            opened.extractall(target)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{archive} cannot be unpacked: {error}") from None


def _files_at(root: Path, name: str, excludes: Sequence[str], leave_out_links: bool) -> Iterator[SourceFile]:
    path = root / name
    if path.is_symlink():
        target = path.resolve()
        if not target.is_file() or not target.is_relative_to(root.resolve()):
            if leave_out_links:
                return
            raise ConfigError(
                f"{path} links to {os.readlink(path)}, which is no file of {root}: the cluster would not have it. "
                f"Leave it out with --exclude {name!r}."
            )
    if path.is_dir():  # a submodule
        for file in collect(path, excludes, leave_out_links=leave_out_links).files:
            yield SourceFile(f"{name}/{file.path}", file.num_bytes)
    elif path.exists():  # else deleted, and not yet committed
        yield SourceFile(name, path.stat().st_size)


@dataclass(frozen=True)
class _Git:
    """`git` for one directory."""

    root: Path
    variables: dict[str, str]
    is_repository: bool

    def names(self, *options: str) -> list[str]:
        """What `git ls-files` lists."""
        never = () if self.is_repository else [word for pattern in _NEVER for word in ("-x", pattern)]
        if "--ignored" in options:
            never = ()
        output = self.run("ls-files", "-z", *options, *never)
        return [name for name in output.split("\0") if name and not name.endswith("/")]

    def commit(self, has_new_files: bool) -> str | None:
        if not self.is_repository:
            return None
        try:
            head = self.run("rev-parse", "HEAD").strip()
        except ConfigError:
            return None  # a repository without a commit
        changed = self.run("status", "--porcelain", "--untracked-files=no", "--", ".").strip()
        return f"{head}+changes" if changed or has_new_files else head

    def run(self, *arguments: str) -> str:
        command = ["git", "-c", "core.quotePath=false", "-C", str(self.root), *arguments]
        done = subprocess.run(command, env=self.variables, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ConfigError(f"`git {' '.join(arguments[:2])}` failed in {self.root}: {done.stderr.strip()}")
        return done.stdout


@contextlib.contextmanager
def _git_for(root: Path) -> Iterator[_Git]:
    # GIT_DIR and its kin, which a git hook sets, would send every question to another repository.
    variables = {name: value for name, value in settings.snapshot().items() if not name.startswith("GIT_")}
    try:
        probe = ["git", "-C", str(root), "rev-parse", "--is-inside-work-tree"]
        inside = subprocess.run(probe, env=variables, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("git is needed to say which files are uploaded, and is not on PATH. Install git.") from None
    if inside.returncode == 0 and inside.stdout.strip() == "true":
        yield _Git(root, variables, is_repository=True)
        return
    if "dubious ownership" in inside.stderr:
        raise ConfigError(f"git does not trust {root}: {inside.stderr.strip()}")
    with tempfile.TemporaryDirectory(prefix="nemo_rl-git-") as empty:
        subprocess.run(["git", "init", "--quiet", "--bare", empty], env=variables, check=True, capture_output=True)
        variables |= {"GIT_DIR": empty, "GIT_WORK_TREE": str(root)}
        yield _Git(root, variables, is_repository=False)
