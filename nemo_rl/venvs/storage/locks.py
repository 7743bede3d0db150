"""Build locks and leases: one process builds a venv, and processes that use it keep it from being removed.

::

    builder A ── flock(EX) .store/<digest16>.lock ── builds, seals ── unlock
    caller  B ── waits for A's lock ──────────────────────────────── sees the seal, returns
    A and B   ── flock(SH) .store/<digest16>.handed-out.lock  until they end: `ensure` has returned this venv to them
    worker    ── flock(SH) <venv>/.nemo_rl_lease  while its process lives
    prune     ── flock(EX, non-blocking) on both: fails while a worker lives, or while another process may start one

All are kernel locks: the kernel releases them when a process ends, also after SIGKILL. Lock files are never deleted: a
process could wait for the deleted file while another locks its successor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_rl import settings
from nemo_rl.errors import VenvLockTimeoutError
from nemo_rl.venvs.storage.verify import MANIFEST_FILE

LEASE_FILE = ".nemo_rl_lease"
_POLL_S = 0.05

# Locks that this process holds on venvs that `ensure` returned: path of the lock file -> descriptor.
_handed_out: dict[Path, int] = {}
_handed_out_guard = threading.Lock()


@contextlib.contextmanager
def build_lock(
    path: Path, venv: str, *, timeout_s: float | None = None, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the exclusive build lock at `path` while the block runs.

    Args:
        venv: name of the venv, for messages.
        timeout_s: default: `NEMO_RL_VENV_LOCK_TIMEOUT_S`.
        on_wait: called once, with a description of the holder, if another process holds the lock.

    Raises:
        VenvLockTimeoutError: another process held the lock for `timeout_s`; names the holder.
    """
    timeout_s = settings.VENV_LOCK_TIMEOUT_S.get() if timeout_s is None else timeout_s
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(descriptor, path, venv, timeout_s, on_wait)
        _write_holder(descriptor, venv)
        yield
    finally:
        os.close(descriptor)  # also unlocks


def _acquire(descriptor: int, path: Path, venv: str, timeout_s: float, on_wait: Callable[[str], None] | None) -> None:
    start = time.monotonic()
    while not _try_lock(descriptor, fcntl.LOCK_EX):
        waited = time.monotonic() - start
        if on_wait is not None:
            on_wait(_holder(path))
            on_wait = None
        if waited > timeout_s:
            raise VenvLockTimeoutError(
                f"Waited {waited:.0f} s on {socket.gethostname()} to build the venv {venv!r}, but {_holder(path)} "
                f"holds its lock {path}. Wait for that process or end it, or raise {settings.VENV_LOCK_TIMEOUT_S.name}."
            )
        time.sleep(min(_POLL_S, timeout_s))


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _write_holder(descriptor: int, venv: str) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%FT%T%z"), "venv": venv}
    with contextlib.suppress(OSError):  # the disk may be full; the lock works anyway
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']}, venv {holder['venv']!r})"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


@dataclass
class Lease:
    """Keeps a venv from being removed until it is released or the process ends.

    Example::

        with hold_lease(venv.path):
            subprocess.run([venv.python, "script.py"])
    """

    path: Path
    _descriptor: int

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold_lease(path: str | os.PathLike[str]) -> Lease:
    """Take a lease on the venv at `path`: `prune` and rebuilds do not remove it while the lease is held.

    Every interpreter that starts in a venv of the store takes a lease itself, and a process that calls `ensure` keeps
    what it got until it ends. This function is for a process that got the path in another way. It works on a read-only
    store.

    Raises:
        FileNotFoundError: there is no sealed venv at `path`.
    """
    root = Path(os.path.realpath(path))
    descriptor = os.open(root / LEASE_FILE, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        os.utime(root / LEASE_FILE)  # the time of the last use, for prune
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink == 0:  # the venv was removed while this process waited
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "the venv has been removed", str(root))
    return Lease(root, descriptor)


@contextlib.contextmanager
def unused(path: Path, *, may_write: bool = True) -> Iterator[bool]:
    """Yield whether no process holds a lease on the venv directory `path`; no process can take one in the block.

    Args:
        may_write: open the lease file for writing, which NFS requires. With False this works on local disks without
            the permission to write.

    Raises:
        OSError: the lease file cannot be opened or locked.
    """
    try:
        # NFS grants an exclusive lock only on a file that is open for writing.
        descriptor = os.open(path / LEASE_FILE, (os.O_RDWR if may_write else os.O_RDONLY) | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # the venv was never sealed, so no process uses it
        return
    try:
        yield _try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def hand_out(path: Path) -> bool:
    """Keep a venv from being removed by other processes until this process ends.

    `ensure` calls it before it returns a venv: nothing else protects the venv until its interpreter has started and
    holds a lease.

    Args:
        path: the lock file of the digest, `Store.handed_out`.

    Returns:
        False if another process is removing the venv at this moment.
    """
    with _handed_out_guard:
        if path in _handed_out:
            return True
        try:
            descriptor = _open_lock(path)
        except OSError:
            return True  # a read-only disk, from which nothing is removed
        try:
            locked = _try_lock(descriptor, fcntl.LOCK_SH)
        except OSError:  # a file system without locks
            os.close(descriptor)
            return True
        if locked:
            _handed_out[path] = descriptor
        else:
            os.close(descriptor)
        return locked


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:  # another user's file: a shared lock needs no permission to write
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def removable(path: Path, handed_out: Path) -> Iterator[bool]:
    """Yield whether the venv directory `path` may be removed; in the block no other process can begin to use it.

    A sealed venv must neither be leased nor be handed out to another process. A directory that was never sealed was
    never handed out. The caller holds the build lock.

    Args:
        handed_out: the lock file of the digest, `Store.handed_out`.

    Raises:
        OSError: a lock file cannot be opened or locked.
    """
    with unused(path) as is_unused, _not_handed_out(handed_out) as is_free:
        yield is_unused and (is_free or not (path / MANIFEST_FILE).exists())


@contextlib.contextmanager
def _not_handed_out(path: Path) -> Iterator[bool]:
    """Yield whether no other process has been handed the venv. `hand_out` returns False elsewhere in the block."""
    with _handed_out_guard:
        held = _handed_out.pop(path, None)
        if held is not None:
            os.close(held)
        descriptor = _open_lock(path)
    try:
        yield _try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)
        if held is not None:
            hand_out(path)
