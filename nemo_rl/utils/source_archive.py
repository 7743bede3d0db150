"""Selects the files of a working directory that a job submission uploads, and archives them.

git lists the files, so patterns have the same meaning as in `.gitignore`. The selection consists of tracked files with
their current content, and new Python files, which a local run would import as well. The user's `--exclude` patterns
remove files from it. Other new files may be data, results or secrets; they are uploaded only on request. A directory
outside a repository is listed in the same way, through an empty temporary repository.

The archive depends only on names, contents and executable bits. The same sources therefore have the same name on the
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

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can store
_CODE = ".py"
# Excluded from directories outside a repository, which have no .gitignore.
_EXCLUDED = (".git/", ".venv/", "venvs/", "__pycache__/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/")


@dataclass(frozen=True)
class SourceFile:
    """Describes a file: its path below the root, with `/` as separator, and its size in bytes."""

    path: str
    num_bytes: int


@dataclass(frozen=True)
class SourceTree:
    """Lists the files of a directory that are uploaded.

    Attributes:
        root: the directory.
        files: the files, sorted by path.
        untracked: files that git neither tracks nor ignores and that are not uploaded.
        commit: commit of the repository, with the suffix `+changes` if the files differ from it. None outside a
            repository.
    """

    root: Path
    files: tuple[SourceFile, ...]
    untracked: tuple[str, ...]
    commit: str | None

    @property
    def num_bytes(self) -> int:
        """Total size of the files before compression."""
        return sum(file.num_bytes for file in self.files)

    def largest(self, count: int) -> list[SourceFile]:
        """Return the `count` largest files, largest first."""
        return sorted(self.files, key=lambda file: (-file.num_bytes, file.path))[:count]


def collect(
    root: Path, excludes: Sequence[str] = (), *, include_untracked: bool = False, skip_links: bool = False
) -> SourceTree:
    """Select tracked files and new Python files below `root`, without `excludes` and files that git ignores.

    Args:
        root: the directory.
        excludes: patterns as in `.gitignore`.
        include_untracked: select all other new files as well.
        skip_links: skip links that lead out of the directory, instead of raising an error.

    Raises:
        ConfigError: the directory does not exist, no file is selected, git is missing, or a link leads out of the
            directory.
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
    files = [file for name in sorted(chosen) for file in _files_at(root, name, excludes, skip_links)]
    if not files:
        raise ConfigError(f"{root} has no file to upload: --exclude matches all tracked files. Try --untracked.")
    return SourceTree(root, tuple(files), tuple(sorted(others)), commit)


def write_zip(tree: SourceTree, target: Path, *, prefix: str = "") -> None:
    """Write the files to a zip file, below `prefix`. Equal sources give identical bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in tree.files:
            path = tree.root / file.path
            entry = zipfile.ZipInfo(prefix + file.path, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(entry, path.read_bytes())


def unpack_zip(archive: Path, target: Path) -> None:
    """Unpack a zip file that is not trusted.

    Raises:
        ConfigError: the file cannot be read, or an entry would lead out of `target`. Nothing is written in that case.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                parts = entry.filename.replace("\\", "/").split("/")
                is_link = (entry.external_attr >> 16) & 0o170000 == 0o120000
                if entry.filename.startswith("/") or ".." in parts or ":" in parts[0] or is_link:
                    raise ConfigError(
                        f"{archive} is not unpacked: its entry {entry.filename!r} would lead out of the target."
                    )
            opened.extractall(target)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{archive} cannot be unpacked: {error}") from None


def _files_at(root: Path, name: str, excludes: Sequence[str], skip_links: bool) -> Iterator[SourceFile]:
    path = root / name
    if path.is_symlink():
        target = path.resolve()
        if not target.is_file() or not target.is_relative_to(root.resolve()):
            if skip_links:
                return
            raise ConfigError(
                f"{path} links to {os.readlink(path)}, which is not a file below {root} and would be missing on the "
                f"cluster. Use --exclude {name!r} to skip it."
            )
    if path.is_dir():  # a submodule
        for file in collect(path, excludes, skip_links=skip_links).files:
            yield SourceFile(f"{name}/{file.path}", file.num_bytes)
    elif path.exists():  # otherwise deleted, but not committed yet
        yield SourceFile(name, path.stat().st_size)


@dataclass(frozen=True)
class _Git:
    """Runs git in one directory."""

    root: Path
    variables: dict[str, str]
    is_repository: bool

    def names(self, *options: str) -> list[str]:
        """Return the files that `git ls-files` lists."""
        excludes = () if self.is_repository else [word for pattern in _EXCLUDED for word in ("-x", pattern)]
        if "--ignored" in options:
            excludes = ()
        output = self.run("ls-files", "-z", *options, *excludes)
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
    # A git hook sets GIT_DIR and similar variables. They would redirect git to another repository.
    variables = {name: value for name, value in settings.snapshot().items() if not name.startswith("GIT_")}
    try:
        probe = ["git", "-C", str(root), "rev-parse", "--is-inside-work-tree"]
        inside = subprocess.run(probe, env=variables, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("git is needed to select the files to upload, and is not on PATH. Install git.") from None
    if inside.returncode == 0 and inside.stdout.strip() == "true":
        yield _Git(root, variables, is_repository=True)
        return
    if "dubious ownership" in inside.stderr:
        raise ConfigError(f"git does not trust {root}: {inside.stderr.strip()}")
    with tempfile.TemporaryDirectory(prefix="nemo_rl-git-") as empty:
        subprocess.run(["git", "init", "--quiet", "--bare", empty], env=variables, check=True, capture_output=True)
        variables |= {"GIT_DIR": empty, "GIT_WORK_TREE": str(root)}
        yield _Git(root, variables, is_repository=False)
