"""One digest for a set of named tensors, equal for sender and receiver whatever buffers and devices they live on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.interfaces import TensorSpec
from nemo_rl.models.weights.row_sums import row_sums
from nemo_rl.utils.futures import completed

_PIECE_BYTES = 512 * 1024


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in a `TensorSpec`: "float32", "bfloat16", ..."""
    return str(dtype).removeprefix("torch.")


def dtype_by_name(name: str) -> torch.dtype:
    """The inverse of `dtype_name`. Raises `WeightSyncError` for a name that torch does not know."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(f"{name!r} is not the name of a torch dtype; expected one like 'float32' or 'bfloat16'")
    return dtype


class WeightDigest:
    """XXH3-128 over name, dtype, shape and the XXH3-128 of the bytes of every tensor, in the order given.

    Names and shapes are part of it, so that two tensors of equal bytes cannot change places; padding between tensors
    is not, so that the layout of the buffers does not matter. Tensors are read by as many threads as torch has in this
    process; `hexdigest` waits for them.

    Args:
        on_gpu: instead of a tensor's bytes take its `row_sums`, computed where it lies: nothing but those leaves a GPU.
            It is another digest: sender and receivers compute the same one.
    """

    def __init__(self, *, on_gpu: bool = False) -> None:
        self._hash = xxhash.xxh3_128()
        self._on_gpu = on_gpu
        self._sums: list[tuple[bytes, torch.Tensor]] = []
        self._threads: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[bytes, Future[bytes]]] = deque()

    def add(self, name: str, dtype: str, shape: Iterable[int], data: npt.NDArray[np.uint8]) -> None:
        """Take in one tensor, whose bytes in row-major order are `data`; they must stay until `settle`."""
        self._add(name, dtype, shape, data.size, lambda: xxhash.xxh3_128(data.data).digest())

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Take in a tensor as it lies in memory (from a GPU it is copied); it must stay until `settle`."""
        if self._on_gpu:
            self._sums.append((_header(name, dtype_name(tensor.dtype), tensor.shape), row_sums(tensor)))
            return
        self.add(name, dtype_name(tensor.dtype), tensor.shape, tensor_bytes(tensor))

    def copy_in(self, spec: TensorSpec, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a tensor, cast to the target's dtype, and take in the copy; both must stay until `settle`.

        Args:
            target: contiguous, of the source's shape; on the CPU, unless the digest is `on_gpu`.
        """
        if self._on_gpu:
            target.copy_(source)
            self.add_tensor(spec.name, target)
            return
        copied = tensor_bytes(target)
        if source.dtype != target.dtype or source.device.type != "cpu" or not source.is_contiguous():
            target.copy_(source)
            self.add(spec.name, spec.dtype, spec.shape, copied)
            return
        original = tensor_bytes(source)
        self._add(spec.name, spec.dtype, spec.shape, copied.size, lambda: _copied(original, copied))

    def settle(self) -> None:
        """Wait until all tensors so far have been read (on GPUs: by what comes later on the same CUDA stream)."""
        self._drain(0)

    def hexdigest(self) -> str:
        """The digest of all tensors, 32 hexadecimal digits. Ends the threads."""
        self._drain(0)
        self._take_sums()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        return self._hash.hexdigest()

    def _add(self, name: str, dtype: str, shape: Iterable[int], num_bytes: int, read: Callable[[], bytes]) -> None:
        header = _header(name, dtype, shape)
        num_threads = torch.get_num_threads()
        if num_threads == 1 or num_bytes < _PIECE_BYTES:
            future = completed(read())
        else:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(num_threads, "digest")
            future = self._threads.submit(read)
        self._pending.append((header, future))
        self._drain(2 * num_threads)  # whoever gathers tensors one by one holds only a few

    def _take_sums(self) -> None:
        if not self._sums:
            return
        headers, sums = zip(*self._sums, strict=True)
        self._sums = []
        on_host = torch.cat(sums).cpu()
        for header, own in zip(headers, on_host.split([len(part) for part in sums]), strict=True):
            self._hash.update(header)
            self._hash.update(xxhash.xxh3_128(tensor_bytes(own).data).digest())

    def _drain(self, num_left: int) -> None:
        while len(self._pending) > num_left:
            header, future = self._pending.popleft()
            self._hash.update(header)
            self._hash.update(future.result())


def _header(name: str, dtype: str, shape: Iterable[int]) -> bytes:
    return f"{name}\0{dtype}\0{tuple(shape)}\0".encode()


def _copied(original: npt.NDArray[np.uint8], copied: npt.NDArray[np.uint8]) -> bytes:
    """Copy, and digest the copy: piece by piece, so that it is read from the processor's cache, and takes no time."""
    digest = xxhash.xxh3_128()
    for start in range(0, copied.size, _PIECE_BYTES):
        piece = slice(start, start + _PIECE_BYTES)
        copied[piece] = original[piece]
        digest.update(copied[piece].data)
    return digest.digest()


def digest_tensors(named_tensors: Iterable[tuple[str, torch.Tensor]], *, on_gpu: bool = False) -> str:
    """The digest over tensors as they lie in this process's memory; `on_gpu` as of `WeightDigest`."""
    digest = WeightDigest(on_gpu=on_gpu)
    for name, tensor in named_tensors:
        digest.add_tensor(name, tensor)
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes in row-major order, one-dimensional; a view where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def check_digest(*, version: int, expected: str, found: str, where: str) -> None:
    """Raise `WeightSyncError` unless the digests are equal.

    Args:
        version: of the weights.
        expected: what the sender computed.
        found: what was computed over the weights as they arrived.
        where: who holds them, for the message.
    """
    if found != expected:
        raise WeightSyncError(
            f"weights of version {version} arrived damaged at {where}: expected digest {expected}, found {found}. "
            "Nothing may be generated with them; restart the job from its last checkpoint."
        )
