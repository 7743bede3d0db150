"""Buckets that one thread fills while one thread of another process on the node reads them, piece by piece.

A piece stays in the CPU cache from the copy to the digest, and on the way to the other process. The sender announces a
bucket (`PiecewiseBucket`) before it fills it. After that, a byte on the stream's socket stands for a piece::

    sender                                            receivers
    ──────                                            ─────────
    copy a piece, digest the copy      ── filled ──►  digest it where it is (`keeps`), or
                                                      copy it into their own memory, and digest that copy
    wait for a free slot (ring only)   ◄── read ───

If a receiver computes with the shared memory, a bucket has room for all of its tensors. Otherwise it is a ring of
`NUM_SLOTS` pieces, which stays in the cache for any size of the model: byte i of the bucket is at i % `RING_BYTES`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from nemo_rl.models.weights.digest import dtype_by_name, tensor_bytes
from nemo_rl.models.weights.interfaces import TensorSpec, WeightBucket

PIECE_BYTES = 512 << 10
NUM_SLOTS = 8
# Waking a process takes as long as a part of a piece. The memory that receivers keep needs no answers.
_TOLD_AT_ONCE = 4
RING_BYTES = NUM_SLOTS * PIECE_BYTES

Bytes = npt.NDArray[np.uint8]
# A part of a tensor: its piece, its place in the tensor and in memory, and where it ends in the bucket.
Part = tuple[int, slice, slice, int]


@dataclass(frozen=True)
class PiecewiseBucket(WeightBucket):
    """Announces a bucket that is about to be filled. `in_ring`: its memory is a ring of `RING_BYTES`."""

    in_ring: bool

    @property
    def memory_bytes(self) -> int:
        """The size of its memory."""
        return RING_BYTES if self.in_ring else self.num_bytes

    @property
    def num_pieces(self) -> int:
        """The number of its pieces."""
        return -(-self.num_bytes // PIECE_BYTES)

    def parts(self, spec: TensorSpec) -> Iterator[Part]:
        """Yield the parts of a tensor; each is in one piece."""
        offset, end = spec.offset, spec.offset + prod(spec.shape) * dtype_by_name(spec.dtype).itemsize
        start, piece = offset, offset // PIECE_BYTES
        while start < end:
            stop = min((piece + 1) * PIECE_BYTES, end)
            slot = start % RING_BYTES if self.in_ring else start
            yield piece, slice(start - offset, stop - offset), slice(slot, slot + stop - start), stop
            start = stop
            piece += 1


class PieceReader:
    """Reads the tensors of one bucket, in its order, while the sender fills it.

    Args:
        connection: the stream's connection; nobody else may use it until `finish`.
        bucket: the bucket.
        memory: [bucket.memory_bytes] uint8.
    """

    def __init__(self, connection: Connection, bucket: PiecewiseBucket, memory: Bytes) -> None:
        self._socket = connection.fileno()
        self._bucket = bucket
        self._memory = memory
        self._num_filled = 0
        self._num_read = 0

    def read(self, spec: TensorSpec, target: Bytes | None) -> bytes:
        """Copy a tensor to `target`, unless it is None, and return the XXH3-128 of its bytes where they are then.

        Raises:
            OSError, EOFError: the sender has ended.
        """
        digest = xxhash.xxh3_128()
        for piece, place, slot, end in self._bucket.parts(spec):
            if piece >= self._num_filled:
                self._wait(piece + 1)
            data = self._memory[slot]
            if target is not None:
                copied = target[place]
                np.copyto(copied, data)
                data = copied
            digest.update(data.data)
            if self._bucket.in_ring:
                self._report(end // PIECE_BYTES)
        return digest.digest()

    def finish(self) -> None:
        """Wait until the bucket is filled, and report that it has been read. Raises the errors of `read`."""
        self._wait(self._bucket.num_pieces)
        self._report(self._bucket.num_pieces)

    def _wait(self, num_filled: int) -> None:
        while self._num_filled < num_filled:
            self._num_filled += _received(self._socket, self._bucket.num_pieces - self._num_filled)

    def _report(self, num_read: int) -> None:
        if self._bucket.in_ring and num_read > self._num_read:
            os.write(self._socket, b"r" * (num_read - self._num_read))
            self._num_read = num_read


class PieceWriter:
    """Fills one bucket, in its order, while receivers read it.

    Args:
        connections: connections of the live receivers, by a number.
        drop: called with the number of a receiver that has ended.
        bucket: the bucket, which has been announced.
        memory: [bucket.memory_bytes] uint8.
    """

    def __init__(
        self,
        connections: Mapping[int, Connection],
        drop: Callable[[int], None],
        bucket: PiecewiseBucket,
        memory: Bytes,
    ) -> None:
        self._sockets = {number: connection.fileno() for number, connection in connections.items()}
        self._drop = drop
        self._bucket = bucket
        self._memory = memory
        self._num_filled = 0
        self._num_read = dict.fromkeys(self._sockets, 0)
        self._told_at_once = 1 if bucket.in_ring else _TOLD_AT_ONCE
        self._num_free = NUM_SLOTS if bucket.in_ring else bucket.num_pieces  # pieces that may be filled without waiting

    def write(self, spec: TensorSpec, source: torch.Tensor) -> bytes:
        """Copy a tensor on any device into the bucket, cast to its dtype there. Returns the XXH3-128 of the copy."""
        copy = _copier(source, dtype_by_name(spec.dtype))
        digest = xxhash.xxh3_128()
        for piece, place, slot, end in self._bucket.parts(spec):
            if piece >= self._num_free:
                self._wait(piece + 1 - NUM_SLOTS)
            target = self._memory[slot]
            copy(place, target)
            digest.update(target.data)
            if end // PIECE_BYTES >= self._num_filled + self._told_at_once:
                self._tell(end // PIECE_BYTES)
        return digest.digest()

    def finish(self) -> None:
        """Tell that the bucket is full, and wait until a ring has been read.

        After that, the receivers send nothing but answers to messages.
        """
        self._tell(self._bucket.num_pieces)
        self._wait(self._bucket.num_pieces)

    def _tell(self, num_filled: int) -> None:
        """Tell the receivers how many pieces are filled."""
        if num_filled == self._num_filled:
            return
        for number, socket in list(self._sockets.items()):
            try:
                os.write(socket, b"f" * (num_filled - self._num_filled))
            except OSError:
                self._lose(number)
        self._num_filled = num_filled

    def _wait(self, num_read: int) -> None:
        """Wait until all receivers have read `num_read` pieces, if the memory is a ring."""
        if not self._bucket.in_ring:
            return
        for number, socket in list(self._sockets.items()):
            try:
                while self._num_read[number] < num_read:
                    self._num_read[number] += _received(socket, self._num_filled - self._num_read[number])
            except (OSError, EOFError):
                self._lose(number)
        self._num_free = (
            min((self._num_read[number] for number in self._sockets), default=self._bucket.num_pieces) + NUM_SLOTS
        )

    def _lose(self, number: int) -> None:
        del self._sockets[number]
        self._drop(number)


def _copier(source: torch.Tensor, dtype: torch.dtype) -> Callable[[slice, Bytes], None]:
    """Return a function that copies a part of a tensor's bytes, after a cast to `dtype`."""
    if source.dtype == dtype:
        original = tensor_bytes(source)
        return lambda place, target: np.copyto(target, original[place])
    flat = source.detach().cpu().contiguous().view(-1)

    def cast(place: slice, target: Bytes) -> None:
        elements = slice(place.start // dtype.itemsize, place.stop // dtype.itemsize)
        torch.from_numpy(target).view(dtype).copy_(flat[elements])

    return cast


def _received(socket: int, most: int) -> int:
    """Wait for at least one byte and return the number of bytes that have arrived, at most `most`."""
    num_bytes = len(os.read(socket, most))
    if num_bytes == 0:
        raise EOFError
    return num_bytes
