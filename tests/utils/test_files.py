"""Atomic writes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl.utils.files import sync_tree, write_atomically


def test_write_replaces_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "schön")
    assert path.read_bytes() == "schön".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_atomically(path, "lone \udc80 surrogate")
    assert path.read_text(encoding="utf-8") == "lone ? surrogate"
    assert os.listdir(path.parent) == ["file.json"]


def test_file_mode_follows_umask(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "content")
    (tmp_path / "other").write_text("content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", "content")
    assert os.listdir(tmp_path) == ["taken"]


def test_reader_never_sees_a_partial_file(tmp_path: Path) -> None:
    """Two processes repeatedly write long files of one letter each while this process reads. Then they are killed."""
    path, size = tmp_path / "file", 4_000_000
    program = (
        "import pathlib, sys\n"
        "from nemo_rl.utils.files import write_atomically\n"
        "while True: write_atomically(pathlib.Path(sys.argv[1]), sys.argv[2] * int(sys.argv[3]))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), letter, str(size)]) for letter in "ab"]
    try:
        seen: set[str] = set()
        while seen != {"a", "b"}:
            assert all(writer.poll() is None for writer in writers)
            if path.exists():
                text = path.read_text()
                assert len(text) == size
                assert len(set(text)) == 1
                seen.add(text[0])
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert len(set(path.read_text())) == 1


def test_content_is_on_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure may come at any moment, so the order of the steps counts. Each step still runs."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("directory" if is_directory else f"{os.fstat(descriptor).st_size} bytes")

    def record_replace(path: Path, target: Path) -> Path:
        steps.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_atomically(tmp_path / "file", "content")
    assert steps == ["7 bytes", "name", "directory"]
    write_atomically(tmp_path / "file", "other", durable=False)
    assert steps == ["7 bytes", "name", "directory", "name"]
    assert (tmp_path / "file").read_text() == "other"


def test_tree_is_synced_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/one", "a/b/two"):
        (tmp_path / name).write_text(name)
    synced: set[str] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    monkeypatch.setattr(os, "fsync", record)
    sync_tree(tmp_path)
    assert synced == {".", "a", "a/b", "a/one", "a/b/two"}
