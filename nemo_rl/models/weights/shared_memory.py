"""Weight buckets in reused shared memory, between processes on one Linux node, without copies and without files.

::

    sender                                     driver, receivers
    ──────                                     ─────────────────
    segment = memfd, mapped once               lease = the same memory, opened through /proc/<sender>/fd
    free? exclusive lock, non-blocking    ◄──  shared lock, from unpickling until handle and tensors are deleted
    fill it, create a lease   ── pickled ──►   map it (kept for the next update), read

New memory costs a page fault per 4 KiB, which takes longer than the copy itself, so a segment is reused as soon as it
has no readers. The kernel owns the locks: when a process is killed, its locks are released, and the memory is freed
with its last user.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.transport import WeightTransport

# Number of segments that a receiver keeps mapped: two updates of 64 buckets each.
_MAX_MAPPINGS = 128
_NAME = "nemo_rl_weights"

# Segments that this process has read: (sender's pid, name) -> mapping. All transports of the process share them.
_mappings: OrderedDict[tuple[int, str], mmap.mmap] = OrderedDict()


class SharedMemoryTransport(WeightTransport):
    """Shares memory between a sender and receivers on one node."""

    streams = True
    piecewise = True
    bucket_bytes = 8 << 20  # stays in the CPU cache from sender to receiver

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._filling: dict[int, _Segment] = {}  # by the address of the buffer

    def allocate(self, num_bytes: int) -> torch.Tensor:
        segment = self._free_segment(num_bytes)
        buffer = torch.frombuffer(segment.mapping, dtype=torch.uint8, count=num_bytes)
        self._filling[buffer.data_ptr()] = segment
        return buffer

    def put(self, buffer: torch.Tensor) -> Lease:
        segment = self._filling.pop(buffer.data_ptr())
        fcntl.flock(segment.fd, fcntl.LOCK_UN)
        lease = Lease(os.getpid(), segment.fd, segment.name, buffer.numel())
        lease.check()
        return lease

    def get(self, handle: Lease) -> torch.Tensor:
        # Through DLPack, because torch.from_numpy warns about read-only arrays. The tensor owns the array.
        return from_dlpack(handle.array())

    def _free_segment(self, num_bytes: int) -> _Segment:
        """Return a segment without readers, locked; a new one if none of that size is free."""
        # Sizes are powers of two, so that buckets of similar sizes share segments. Unwritten pages take no memory.
        size = max(mmap.PAGESIZE, 1 << (num_bytes - 1).bit_length())
        for segment in self._segments:
            if segment.num_bytes == size and segment.lock():
                return segment
        segment = _Segment(size)
        segment.lock()
        self._segments.append(segment)
        return segment


class _Segment:
    """Anonymous memory of the sender. It exists as long as a process has it open or mapped."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.name = f"{_NAME}_{secrets.token_hex(8)}"
        self.fd = os.memfd_create(self.name, os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, num_bytes)
        self.mapping = mmap.mmap(self.fd, num_bytes)

    def lock(self) -> bool:
        """Lock the segment for writing; returns False while a lease exists."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class Lease:
    """Protects a filled segment from reuse while the lease, or an array of it, exists.

    Unpickling creates another lease. On another node, or after the sender has ended, the unpickled lease cannot read
    the segment, but it can be pickled again and forwarded.
    """

    def __init__(self, pid: int, fd: int, name: str, num_bytes: int) -> None:
        self._origin = (pid, fd, name, num_bytes)
        self._fd = _open_segment(pid, fd, name)
        if self._fd is not None:
            weakref.finalize(self, os.close, self._fd)
            fcntl.flock(self._fd, fcntl.LOCK_SH)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lease, self._origin

    def check(self) -> None:
        """Raise `WeightSyncError` if this process cannot read the memory."""
        if self._fd is None:
            raise WeightSyncError(
                f"published weights cannot be read: process {self._origin[0]}, which holds them, has ended or cannot "
                "be reached from this process. Restart the job; with workers on several nodes or in several containers "
                "set policy.weight_transport=ray."
            )

    def array(self) -> npt.NDArray[np.uint8]:
        """Return the bytes, which must not be written to. The array keeps the lease. Raises the error of `check`."""
        self.check()
        pid, _, name, num_bytes = self._origin
        array = np.frombuffer(self._mapping(pid, name), dtype=np.uint8, count=num_bytes).view(_LeasedArray)
        array.lease = self
        return array

    def _mapping(self, pid: int, name: str) -> mmap.mmap:
        mapping = _mappings.get((pid, name))
        if mapping is None:
            # A mapping duplicates its file descriptor, and the duplicate would hold the lease's lock. So the mapping
            # gets another open file, without a lock.
            unlocked = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            mapping = mmap.mmap(unlocked, 0, prot=mmap.PROT_READ)
            os.close(unlocked)
            _mappings[pid, name] = mapping
            if len(_mappings) > _MAX_MAPPINGS:
                _mappings.popitem(last=False)
        _mappings.move_to_end((pid, name))
        return mapping


class _LeasedArray(np.ndarray[Any, np.dtype[np.uint8]]):
    """An array that keeps the lease of its memory alive."""

    lease: Lease


def _open_segment(pid: int, fd: int, name: str) -> int | None:
    """Open a segment of another process (or of this one); returns None if it does not exist."""
    try:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    except OSError as error:
        raise WeightSyncError(
            f"published weights cannot be opened: {error}. Each bucket is an open file: raise the limit (ulimit -n) or "
            "policy.weight_bucket_mib, or set policy.weight_transport=ray."
        ) from error
    # A process on this node may have the pid and file descriptor of the sender on another node.
    if os.readlink(f"/proc/self/fd/{opened}").startswith(f"/memfd:{name}"):
        return opened
    os.close(opened)
    return None
