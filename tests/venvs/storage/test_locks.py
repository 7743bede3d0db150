"""Build locks and leases between processes and threads."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from nemo_rl.errors import VenvLockTimeoutError
from nemo_rl.venvs.storage.locks import LEASE_FILE, build_lock, hold_lease, unused


def test_build_lock_excludes_threads(tmp_path: Path) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with build_lock(tmp_path / "x.lock", "A"):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)


def test_waiting_process_learns_the_holder_once(tmp_path: Path) -> None:
    holders: list[str] = []
    with (
        build_lock(tmp_path / "x.lock", "some.Worker"),
        pytest.raises(VenvLockTimeoutError, match=r"some\.Worker"),
        build_lock(tmp_path / "x.lock", "other", timeout_s=0.2, on_wait=holders.append),
    ):
        pass
    assert len(holders) == 1
    assert "some.Worker" in holders[0]
    with build_lock(tmp_path / "x.lock", "other", timeout_s=0.0):
        pass


def test_content_of_a_lock_file_does_not_lock(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    for content in ('{"pid": 1, "host": "gone", "since": "then", "venv": "A"}', "garbage", ""):
        lock.write_text(content)
        with build_lock(lock, "B", timeout_s=0.0):
            assert '"B"' in lock.read_text()


def test_leases_are_shared_and_prevent_removal(tmp_path: Path) -> None:
    with unused(tmp_path) as free:
        assert free  # never sealed
    (tmp_path / LEASE_FILE).touch()
    with hold_lease(tmp_path), hold_lease(tmp_path), unused(tmp_path) as free:
        assert not free
    with unused(tmp_path) as free:
        assert free
