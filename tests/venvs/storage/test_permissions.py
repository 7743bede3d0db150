"""Venvs are not writable by other users."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_projects import Project

from nemo_rl.venvs import Store, ensure
from nemo_rl.venvs.storage.layout import not_writable_by_others


@pytest.fixture
def careless_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set a umask of 0, and an empty uv cache."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(0)
    yield
    os.umask(before)


def writable_by_others(folder: Path) -> list[Path]:
    """Return files and directories that others may write, without links and uv's empty lock file."""
    paths = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    return [path for path in paths if path.stat().st_mode & 0o002 and (path.name != ".lock" or path.read_bytes())]


@pytest.mark.usefixtures("careless_umask")
def test_venv_is_not_writable_by_others(project: Project, store: Store) -> None:
    (store.root.parent / "witness").touch()
    assert writable_by_others(store.root.parent / "witness"), "this umask has to be a careless one"
    ensure(project.command("--extra", "one", "--with", "epsilon"), "worker")
    assert len(list(store.root.rglob("*"))) > 50
    assert not writable_by_others(store.root)


@pytest.mark.usefixtures("careless_umask")
def test_last_thread_restores_the_umask(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with not_writable_by_others():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait(30)
    with not_writable_by_others():
        pass
    (tmp_path / "while-one-is-inside").touch()
    leave.set()
    thread.join()
    (tmp_path / "after").touch()
    assert not writable_by_others(tmp_path / "while-one-is-inside")
    assert writable_by_others(tmp_path / "after")
