"""Nobody else may write what everybody runs."""

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
    """A process whose files everybody may write, and a cache of uv's that it has not filled before."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(0)
    yield
    os.umask(before)


def writable_by_others(folder: Path) -> list[Path]:
    """Files and directories below `folder`. A link's own mode says nothing; uv opens its empty lock to everybody."""
    found = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    return [path for path in found if path.stat().st_mode & 0o002 and (path.name != ".lock" or path.read_bytes())]


@pytest.mark.usefixtures("careless_umask")
def test_a_venv_is_not_writable_by_others_whatever_the_umask(project: Project, store: Store) -> None:
    (store.root.parent / "witness").touch()
    assert writable_by_others(store.root.parent / "witness"), "this umask has to be a careless one"
    ensure(project.command("--extra", "one", "--with", "epsilon"), "worker")
    assert len(list(store.root.rglob("*"))) > 50
    assert not writable_by_others(store.root)


@pytest.mark.usefixtures("careless_umask")
def test_the_umask_is_put_back_when_the_last_thread_is_done(tmp_path: Path) -> None:
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
