"""Selection and archives of a job's source files, with real git repositories."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from nemo_rl.errors import ConfigError
from nemo_rl.utils.source_archive import collect, unpack_zip, write_zip


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository that tracks `a.py` and two files in `data`, ignores `secret.env`, and has an untracked file."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet")
    (root / ".gitignore").write_text("*.env\n")
    write(root, {"a.py": "A", "data/big.bin": "b" * 5000, "data/small.bin": "s", "secret.env": "hf_secret"})
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    write(root, {"notes.txt": "N"})
    return root


def names(root: Path, *excludes: str, include_untracked: bool = False) -> list[str]:
    return [file.path for file in collect(root, excludes, include_untracked=include_untracked).files]


def test_tracked_files_are_collected_from_disk(repository: Path, tmp_path: Path) -> None:
    (repository / "a.py").write_text("changed")
    tree = collect(repository)
    assert [file.path for file in tree.files] == [".gitignore", "a.py", "data/big.bin", "data/small.bin"]
    assert tree.untracked == ("notes.txt",)
    assert tree.commit is not None
    assert tree.commit.endswith("+changes")
    write_zip(tree, tmp_path / "out.zip")
    assert zipfile.ZipFile(tmp_path / "out.zip").read("a.py") == b"changed"


def test_ignored_files_are_never_collected(repository: Path) -> None:
    assert "notes.txt" in names(repository, include_untracked=True)
    assert "secret.env" not in names(repository, include_untracked=True)


def test_new_python_files_are_collected(repository: Path) -> None:
    first = collect(repository).commit
    write(repository, {"mine/worker.py": "W", "mine/secrets.py": "S", ".gitignore": "*.env\nsecrets.py\n"})
    git(repository, "commit", "--quiet", "-am", "second")
    tree = collect(repository)
    assert [file.path for file in tree.files if file.path.endswith(".py")] == ["a.py", "mine/worker.py"]
    assert tree.untracked == ("notes.txt",)
    assert first is not None
    assert not first.endswith("+changes")
    assert tree.commit is not None
    assert tree.commit.endswith("+changes"), "the commit does not contain the new file"
    without = collect(repository, ["mine/"])
    assert "mine/worker.py" not in [file.path for file in without.files]
    assert without.commit == tree.commit.removesuffix("+changes")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.bin"], [".gitignore", "a.py"]),
        (["data/"], [".gitignore", "a.py"]),
        (["/small.bin"], [".gitignore", "a.py", "data/big.bin", "data/small.bin"]),
        (["*.bin", "!small.bin"], [".gitignore", "a.py", "data/small.bin"]),
        (["data/big*", ".gitignore"], ["a.py", "data/small.bin"]),
    ],
)
def test_excludes_follow_gitignore_rules(repository: Path, patterns: list[str], expected: list[str]) -> None:
    assert names(repository, *patterns) == expected


def test_deleted_files_and_subdirectories(repository: Path) -> None:
    (repository / "data" / "big.bin").unlink()
    assert names(repository / "data") == ["small.bin"]


def test_submodule_files_are_collected(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    write(other, {"x.py": "x"})
    git(other, "add", ".")
    git(other, "commit", "--quiet", "-m", "first")
    git(repository, "submodule", "--quiet", "add", str(other), "third")
    assert "third/x.py" in names(repository)


def test_collect_outside_a_repository(tmp_path: Path) -> None:
    unwanted = {".venv/bin/python": "p", "pkg/__pycache__/m.pyc": "c", "pkg/m.py": "m"}
    write(tmp_path, {"a.py": "a", "pkg/n.py": "n", **unwanted})
    tree = collect(tmp_path, ["m.py"])
    assert [file.path for file in tree.files] == ["a.py", "pkg/n.py"]
    assert tree.commit is None


def test_outside_link_is_refused(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("o")
    (repository / "link").symlink_to(tmp_path / "outside")
    (repository / "inside").symlink_to("a.py")
    git(repository, "add", ".")
    with pytest.raises(ConfigError, match="--exclude 'link'"):
        collect(repository)
    assert "inside" in names(repository, "link")


def test_archives_do_not_depend_on_file_times(repository: Path, tmp_path: Path) -> None:
    write_zip(collect(repository), tmp_path / "one.zip")
    (repository / "a.py").touch()
    git(repository, "commit", "--quiet", "--allow-empty", "-m", "second")
    write_zip(collect(repository), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    (repository / "a.py").chmod(0o755)
    write_zip(collect(repository), tmp_path / "three.zip")
    assert (tmp_path / "three.zip").read_bytes() != (tmp_path / "one.zip").read_bytes()


def test_collect_errors(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file to upload"):
        collect(repository, ["*"])
    with pytest.raises(ConfigError, match="does not exist"):
        collect(tmp_path / "missing")


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "a/../../evil", "C:/evil"])
def test_unsafe_archive_is_not_unpacked(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("good.py", "good")
        archive.writestr(name, "evil")
    with pytest.raises(ConfigError, match="would lead out"):
        unpack_zip(tmp_path / "evil.zip", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_archive_with_a_link_is_not_unpacked(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("link")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(ConfigError, match="would lead out"):
        unpack_zip(tmp_path / "evil.zip", tmp_path / "target")
