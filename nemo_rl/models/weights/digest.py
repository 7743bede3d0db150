"""A digest of named tensors that does not depend on the buffers and devices that hold them.

Sender and receivers compute it over their own memory and compare. On GPUs it is computed from `row_sums` instead of the
tensors' bytes, so that a few bytes per row leave the GPU.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.interfaces import TensorSpec
from nemo_rl.utils.futures import completed

WORDS_PER_ROW = 4096
_WORD_BYTES = 4
# 32 MiB of products, which stay in a GPU's cache until they are summed.
_ROWS_AT_ONCE = 1024
_PIECE_BYTES = 512 * 1024


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a `TensorSpec`: "float32", "bfloat16", ...

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def dtype_by_name(name: str) -> torch.dtype:
    """Invert `dtype_name`. Raises `WeightSyncError` if the name is not a torch dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(f"{name!r} is not the name of a torch dtype; expected one like 'float32' or 'bfloat16'")
    return dtype


class WeightDigest:
    """Computes the XXH3-128 over name, dtype, shape and the XXH3-128 of the bytes of every tensor, in the given order.

    Names and shapes are included, so tensors with equal bytes cannot be swapped. Padding between tensors is not, so the
    layout of the buffers does not matter. As many threads as torch has in this process read the tensors; `hexdigest`
    waits for them.

    Example:
        >>> digest = WeightDigest()
        >>> digest.add_tensor("weight", torch.ones(2, 2))
        >>> len(digest.hexdigest())
        32

    Args:
        on_gpu: digest each tensor's `row_sums`, computed on its device, instead of its bytes. The result differs from
            the digest of the bytes, so sender and receivers must use the same value.
    """

    def __init__(self, *, on_gpu: bool = False) -> None:
        self._hash = xxhash.xxh3_128()
        self._on_gpu = on_gpu
        self._sums: list[tuple[bytes, torch.Tensor]] = []
        self._threads: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[bytes, Future[bytes]]] = deque()

    def add(self, name: str, dtype: str, shape: Iterable[int], data: npt.NDArray[np.uint8]) -> None:
        """Add one tensor with the row-major bytes `data`, which must not change until `settle`."""
        self._add(name, dtype, shape, data.size, lambda: xxhash.xxh3_128(data.data).digest())

    def add_digested(self, spec: TensorSpec, digest: bytes) -> None:
        """Add one tensor by the XXH3-128 of its bytes."""
        self._drain(0)
        self._hash.update(_header(spec.name, spec.dtype, spec.shape))
        self._hash.update(digest)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor (a CUDA tensor is copied to the host unless `on_gpu`). It must not change until `settle`."""
        if self._on_gpu:
            self._sums.append((_header(name, dtype_name(tensor.dtype), tensor.shape), row_sums(tensor)))
            return
        self.add(name, dtype_name(tensor.dtype), tensor.shape, tensor_bytes(tensor))

    def copy_in(self, spec: TensorSpec, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy `source` into `target`, cast to its dtype, and add the copy. Both must not change until `settle`.

        Args:
            spec: name, dtype and shape of the copy.
            source: the tensor.
            target: contiguous, in the source's shape; on the CPU unless the digest is `on_gpu`.
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
        """Wait until all added tensors have been read. With `on_gpu` it returns at once: the reads are queued on the
        current CUDA stream, so later work on that stream runs after them."""
        self._drain(0)

    def hexdigest(self) -> str:
        """Return the digest of all tensors, 32 hexadecimal digits, and end the threads."""
        self._drain(0)
        self._hash_sums()
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
        self._drain(2 * num_threads)  # bounds the tensors held by a caller that gathers them one by one

    def _hash_sums(self) -> None:
        if not self._sums:
            return
        headers, sums = zip(*self._sums, strict=True)
        self._sums = []
        on_host = torch.cat(sums).cpu()
        for header, tensor_sums in zip(headers, on_host.split([len(part) for part in sums]), strict=True):
            self._hash.update(header)
            self._hash.update(xxhash.xxh3_128(tensor_bytes(tensor_sums).data).digest())

    def _drain(self, max_pending: int) -> None:
        while len(self._pending) > max_pending:
            header, future = self._pending.popleft()
            self._hash.update(header)
            self._hash.update(future.result())


def _header(name: str, dtype: str, shape: Iterable[int]) -> bytes:
    return f"{name}\0{dtype}\0{tuple(shape)}\0".encode()


def _copied(original: npt.NDArray[np.uint8], copied: npt.NDArray[np.uint8]) -> bytes:
    """Copy and digest piece by piece, so that the digest reads each piece from the CPU cache at almost no cost."""
    digest = xxhash.xxh3_128()
    for start in range(0, copied.size, _PIECE_BYTES):
        piece = slice(start, start + _PIECE_BYTES)
        copied[piece] = original[piece]
        digest.update(copied[piece].data)
    return digest.digest()


def digest_tensors(named_tensors: Iterable[tuple[str, torch.Tensor]], *, on_gpu: bool = False) -> str:
    """Return the digest of tensors in this process's memory; see `WeightDigest` for `on_gpu`."""
    digest = WeightDigest(on_gpu=on_gpu)
    for name, tensor in named_tensors:
        digest.add_tensor(name, tensor)
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return a tensor's bytes in row-major order, one-dimensional; a view if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def check_digest(*, version: int, expected: str, found: str, where: str) -> None:
    """Raise `WeightSyncError` unless the digests are equal.

    Args:
        version: version of the weights.
        expected: the sender's digest.
        found: the digest of the weights that arrived.
        where: the receiver, for the message.
    """
    if found != expected:
        raise WeightSyncError(
            f"weights of version {version} arrived damaged at {where}: expected digest {expected}, found {found}. "
            "They must not be used for generation; restart the job from its last checkpoint."
        )


def row_sums(tensor: torch.Tensor) -> torch.Tensor:
    """Reduce a tensor's row-major bytes to [ceil(bytes / 16 KiB)] int64 on its device; an empty tensor to [0].

    The bytes are read as 32-bit words w, in rows of `WORDS_PER_ROW`. Each row becomes the sum of w[i] * c[i] modulo
    2^64, with fixed pseudo-random odd 64-bit c (multilinear hashing: Carter and Wegman, "Universal classes of hash
    functions", 1979). A change of one word always changes the sum of its row. Any other damage that is independent of c
    goes undetected with a probability of at most 2^-32. This is no defence against an attacker.

    The call does not wait for the device. The last word is padded with zeros.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.data_ptr() % _WORD_BYTES or data.numel() % _WORD_BYTES:
        data = torch.nn.functional.pad(data, (0, -data.numel() % _WORD_BYTES))  # a copy, which is aligned
    words = data.view(torch.int32)
    factors = _factors(str(tensor.device))
    num_rows = words.numel() // WORDS_PER_ROW
    rows = words[: num_rows * WORDS_PER_ROW].view(num_rows, WORDS_PER_ROW)
    sums = [(part * factors).sum(dim=1) for part in rows.split(_ROWS_AT_ONCE)] if num_rows else []
    remainder = words[num_rows * WORDS_PER_ROW :]
    if remainder.numel():
        sums.append((remainder * factors[: remainder.numel()]).sum(dim=0, keepdim=True))
    return torch.cat(sums) if sums else words.long()


@functools.cache
def _factors(device: str) -> torch.Tensor:
    drawn = np.random.Generator(np.random.PCG64(20_26)).integers(0, 2**63, WORDS_PER_ROW, dtype=np.int64)
    return torch.from_numpy(drawn * 2 + 1).to(device)
