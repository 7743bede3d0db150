"""Weight buckets in shared memory that is used again: between processes of one node, without a copy and without a file.

::

    sender                                     driver, receivers
    ──────                                     ─────────────────
    segment = memfd, mapped once               lease = the same memory, opened through /proc/<sender>/fd
    free?  exclusive lock, without waiting ◄── a shared lock, from unpickling until handle and tensors are gone
    fill it, hand out a lease  ── pickled ──►  map it (kept for the next update), read

New memory costs a page fault per 4 KiB, which takes longer than the copy itself; so segments are filled again as soon
as nobody reads them. The kernel keeps the locks: those of a process that was killed are gone with it, and so is the
memory once all of its users are. Linux only.
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

# How many segments a receiver keeps mapped: two updates of 64 buckets each.
_MAX_MAPPINGS = 128
_NAME = "nemo_rl_weights"

# Segments that this process has read: (sender's pid, name) -> mapping. Shared by all transports of the process.
_mappings: OrderedDict[tuple[int, str], mmap.mmap] = OrderedDict()


class SharedMemoryTransport(WeightTransport):
    """The node's memory, for a sender and receivers that run on one node."""

    streams = True
    bucket_bytes = 8 << 20  # stay in the processor's cache on their way

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
        # Through DLPack, because torch.from_numpy warns of arrays that are not writable. The tensor owns the array.
        return from_dlpack(handle.array())

    def _free_segment(self, num_bytes: int) -> _Segment:
        """A segment that nobody reads, locked; a new one where there is none of that size."""
        # Powers of two, so that buckets of almost the same size can take one another's place. What is not written to
        # takes no memory.
        size = max(mmap.PAGESIZE, 1 << (num_bytes - 1).bit_length())
        for segment in self._segments:
            if segment.num_bytes == size and segment.lock():
                return segment
        segment = _Segment(size)
        segment.lock()
        self._segments.append(segment)
        return segment


class _Segment:
    """Anonymous memory of the sender; it lives as long as somebody has it open or mapped."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.name = f"{_NAME}_{secrets.token_hex(8)}"
        self.fd = os.memfd_create(self.name, os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, num_bytes)
        self.mapping = mmap.mmap(self.fd, num_bytes)

    def lock(self) -> bool:
        """Take it for filling. False while somebody has a lease."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class Lease:
    """The right to read a filled segment: it is not filled again while the lease, or an array of it, lives.

    Unpickling it takes a lease of one's own. On another node, or when the sender is gone, that is not possible; the
    lease is then good for nothing but being passed on.
    """

    def __init__(self, pid: int, fd: int, name: str, num_bytes: int) -> None:
        self._origin = (pid, fd, name, num_bytes)
        self._own_fd = _open_segment(pid, fd, name)
        if self._own_fd is not None:
            weakref.finalize(self, os.close, self._own_fd)
            fcntl.flock(self._own_fd, fcntl.LOCK_SH)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lease, self._origin

    def check(self) -> None:
        """Raise `WeightSyncError` unless the memory can be reached from here."""
        if self._own_fd is None:
            raise WeightSyncError(
                f"published weights cannot be read: process {self._origin[0]}, which holds them, has ended or cannot "
                "be reached from here. Restart the job; with workers on several nodes or in several containers set "
                "policy.weight_transport=ray."
            )

    def array(self) -> npt.NDArray[np.uint8]:
        """The bytes, not to be written to; the array keeps the lease. Raises as `check` does."""
        self.check()
        pid, _, name, num_bytes = self._origin
        array = np.frombuffer(self._mapping(pid, name), dtype=np.uint8, count=num_bytes).view(_LeasedArray)
        array.lease = self
        return array

    def _mapping(self, pid: int, name: str) -> mmap.mmap:
        mapping = _mappings.get((pid, name))
        if mapping is None:
            # A mapping keeps a duplicate of its file descriptor, and with it the lock that belongs to that: so it gets
            # one of its own, without a lock.
            unlocked = os.open(f"/proc/self/fd/{self._own_fd}", os.O_RDONLY | os.O_CLOEXEC)
            mapping = mmap.mmap(unlocked, 0, prot=mmap.PROT_READ)
            os.close(unlocked)
            _mappings[pid, name] = mapping
            if len(_mappings) > _MAX_MAPPINGS:
                _mappings.popitem(last=False)
        _mappings.move_to_end((pid, name))
        return mapping


class _LeasedArray(np.ndarray[Any, np.dtype[np.uint8]]):
    """An array that keeps the lease of its memory."""

    lease: Lease


def _open_segment(pid: int, fd: int, name: str) -> int | None:
    """Open a segment of another process (or of this one); None when it is not there."""
    try:
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    except OSError as error:
        raise WeightSyncError(
            f"published weights cannot be opened: {error}. Each bucket is an open file: raise the limit (ulimit -n) or "
            "policy.weight_bucket_mib, or set policy.weight_transport=ray."
        ) from error
    # A process of another node may have the same id, and a file under the same number.
    if os.readlink(f"/proc/self/fd/{own}").startswith(f"/memfd:{name}"):
        return own
    os.close(own)
    return None
