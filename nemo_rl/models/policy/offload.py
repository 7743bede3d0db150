"""Moves the memory of a policy worker to the host while generation uses the same device.

A model with P parameters takes, per worker (its share of P if the model is sharded)::

    part              torch          Megatron, bfloat16             when offloaded
    WEIGHTS           4 P bytes      2 P                            copied to the host
    OPTIMIZER         8 P            12 P / data-parallel workers   copied to the host
    GRADIENTS         4 P            4 P (float32 reduction)        dropped: they are not kept between calls
    REFERENCE         4 P            2 P                            copied to the host once: it never changes

A method declares the parts that it needs (`needs`, `borrows`), which are then loaded before it runs;
`PolicyMemory.offload` moves all parts to the host.
Memory moves by storage: parameters, views and tied weights remain the same objects in modules, gradient buffers and
optimizers, and a shared storage moves once. On CPUs the same happens, from host memory to host memory.

Of megatron-core's helpers only those for gradient buffers are used. Its helpers for weights and optimizer states
support the distributed optimizer only, replace tensors instead of moving them (a float32 optimizer steps views of the
weights), and wait for pageable memory.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_rl.errors import ModelError, TrainingError

logger = logging.getLogger(__name__)

# A power of two, because pinned memory is rounded up to one.
_CHUNK_BYTES = 256 << 20
_ALIGNMENT = 256
_GIB = 1 << 30

Tensors = Callable[[], Iterable[torch.Tensor]]


class Part(StrEnum):
    """A part of a worker's memory that moves as a unit."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer state"
    REFERENCE = "weights of the reference policy"


class Movable(Protocol):
    """A part that can be moved from the device to the host and back."""

    def to_host(self) -> None:
        """Free its memory on the device. If this raises, the part is still on the device."""

    def to_device(self) -> None:
        """Allocate memory on the device and start to fill it. If this raises, the part is still on the host."""

    def wait(self) -> None:
        """Make later computations on the device wait until the memory is filled; does not block this thread."""


@dataclass(frozen=True)
class Scratch:
    """A part whose contents are dropped when it is offloaded. `release` may be called repeatedly."""

    release: Callable[[], object]
    allocate: Callable[[], object] = lambda: None

    def to_host(self) -> None:
        self.release()

    def to_device(self) -> None:
        self.allocate()

    def wait(self) -> None:
        """Do nothing: the memory is ready when `allocate` returns."""


@dataclass(frozen=True)
class _StoragePlace:
    """A storage of `num_bytes` and its `offset` in host memory."""

    storage: torch.UntypedStorage
    num_bytes: int
    offset: int


class StoredTensors:
    """Moves the memory of tensors to the host and back, with its contents.

    Copies run on a separate CUDA stream, to and from pinned memory that is reused.

    Args:
        tensors: returns the current tensors; called by each `to_host`. Of sharded tensors, the local shards move.
        device: device of all tensors.
        constant: the contents never change, so they are copied to the host only once.
    """

    def __init__(self, tensors: Tensors, device: torch.device, *, constant: bool = False) -> None:
        self._tensors = tensors
        self._device = device
        self._constant = constant
        self._host = _HostMemory(pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: list[_StoragePlace] = []
        self._is_copied = False

    def to_host(self) -> None:
        self._places = list(_places(self._tensors()))
        if not (self._constant and self._is_copied):
            self._host.reserve(sum(place.num_bytes + _ALIGNMENT for place in self._places))
            with self._copying():
                for place in self._places:
                    for on_host, on_device in self._chunks(place):
                        on_host.copy_(on_device, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
            self._is_copied = True
        for place in self._places:
            place.storage.resize_(0)

    def to_device(self) -> None:
        try:
            for place in self._places:
                place.storage.resize_(place.num_bytes)
        except torch.OutOfMemoryError:
            for place in self._places:
                place.storage.resize_(0)
            raise
        with self._copying():
            for place in self._places:
                for on_host, on_device in self._chunks(place):
                    on_device.copy_(on_host, non_blocking=True)

    def wait(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        # Newly allocated memory may still be used by kernels that run on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _chunks(self, place: _StoragePlace) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield a storage's memory on the host and on the device as uint8, split at the chunks of host memory."""
        on_device = torch.empty(0, dtype=torch.uint8, device=self._device).set_(place.storage)
        start = 0
        for on_host in self._host.slices(place.offset, place.num_bytes):
            yield on_host, on_device[start : start + len(on_host)]
            start += len(on_host)


class _HostMemory:
    """Host memory in chunks; it never shrinks."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._chunks: list[torch.Tensor] = []
        self._starts: list[int] = []
        self._num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Grow to at least `num_bytes`. Raises `TrainingError` if the host has not enough memory."""
        while self._num_bytes < num_bytes:
            size = min(_CHUNK_BYTES, num_bytes - self._num_bytes)
            try:
                chunk = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            except RuntimeError as error:
                raise TrainingError(
                    f"policy.offload needs {num_bytes / _GIB:.1f} GiB of this node's memory for one of the parts of "
                    f"one worker, but only {self._num_bytes / _GIB:.1f} GiB could be allocated: {error}. Shard the "
                    "policy over more workers, or set policy.offload=false"
                ) from error
            self._chunks.append(chunk)
            self._starts.append(self._num_bytes)
            self._num_bytes += size

    def slices(self, offset: int, num_bytes: int) -> Iterator[torch.Tensor]:
        """Yield `num_bytes` bytes starting at `offset`, split at the boundaries of chunks."""
        index = bisect.bisect_right(self._starts, offset) - 1
        while num_bytes:
            part = self._chunks[index][offset - self._starts[index] :][:num_bytes]
            yield part
            offset += len(part)
            num_bytes -= len(part)
            index += 1


def _places(tensors: Iterable[torch.Tensor]) -> Iterator[_StoragePlace]:
    """Yield each distinct resizable storage once, in the order of the tensors.

    Some CPU storages are not resizable and stay: those mapped from a file or shared with numpy.
    """
    seen: set[int] = set()
    offset = 0
    for tensor in tensors:
        local = tensor.detach()
        storage = (local.to_local() if isinstance(local, DTensor) else local).untyped_storage()
        num_bytes = storage.nbytes()
        if num_bytes and storage.resizable() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield _StoragePlace(storage, num_bytes, offset)
            offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class PolicyMemory:
    """Tracks which parts of one worker's memory are on the device.

    Attributes:
        is_shared: whether `offload` has been called, which means that another process uses the device too.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_shared = False
        self._device = device
        self._parts: dict[Part, Movable] = {}
        self._on_host: set[Part] = set()

    def add(self, part: Part, movable: Movable) -> None:
        """Track a part that is on the device."""
        self._parts[part] = movable

    def is_loaded(self, part: Part) -> bool:
        """Whether a part is on the device; False if it was not added."""
        return part in self._parts and part not in self._on_host

    def guard(self, module: nn.Module, part: Part) -> None:
        """Make calls of `module` raise `ModelError` while its weights (`part`) are on the host.

        Without this check, kernels would read from address 0.
        """
        # A weak reference, because parts reference the optimizer, which references megatron-core's wrapper, whose
        # gradient hooks C++ holds. Python's garbage collector cannot see that cycle, so the model would never be freed.
        memory = weakref.proxy(self)

        def check(*_: Any) -> None:
            if not memory.is_loaded(part):
                raise ModelError(
                    f"the {part} are in the host's memory: this method does not declare that it needs them"
                )

        module.register_forward_pre_hook(check, prepend=True)  # runs before FSDP gathers the weights

    def offload(self, *, keep_weights: bool = False) -> None:
        """Move all parts to the host, except the weights if they are kept.

        Raises:
            TrainingError: the host has not enough memory.
        """
        self.is_shared = True
        self._move_to_host(part for part in self._parts if not (keep_weights and part == Part.WEIGHTS))

    def prefetch(self, *parts: Part) -> None:
        """Start to copy offloaded parts back. Call `load` before they are used.

        Raises:
            TrainingError: the device has not enough memory.
        """
        for part in parts:
            if part in self._on_host:
                try:
                    self._parts[part].to_device()
                except torch.OutOfMemoryError as error:
                    raise TrainingError(
                        f"the policy's memory ({part}) does not fit back on {self._device}: {error}. Generation keeps "
                        "too much memory while it sleeps, or the batch is too large: lower "
                        "policy.train_micro_batch_size, or shard the policy over more workers"
                    ) from error
                self._on_host.discard(part)

    def load(self, *parts: Part) -> None:
        """Copy offloaded parts back for all later computations on the device. Raises the errors of `prefetch`."""
        self.prefetch(*parts)
        for part in parts:
            self._parts[part].wait()

    @contextlib.contextmanager
    def loaded(self, part: Part) -> Iterator[None]:
        """Keep a part on the device while the block runs. The block may add the part.

        If memory is shared and the part was on the host before, it is offloaded again.
        """
        was_here = self.is_loaded(part)
        if part in self._parts:
            self.load(part)
        try:
            yield
        finally:
            if self.is_shared and not was_here and part in self._parts:
                self._move_to_host([part])

    def _move_to_host(self, parts: Iterable[Part]) -> None:
        moving = [part for part in parts if part not in self._on_host]
        if not moving:
            return
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self._device)  # collectives on other streams may still read them
        for part in moving:
            self._parts[part].to_host()
            self._on_host.add(part)
        if on_gpu:
            torch.cuda.ipc_collect()  # frees weights that were sent
            torch.cuda.empty_cache()  # the allocator's cache is not available to other processes
        logger.debug("moved to the host: %s", ", ".join(moving))


MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def needs(*parts: Part) -> Callable[[MethodT], MethodT]:
    """Decorate a method of a worker with a `_memory`: load these parts first; they stay on the device."""

    def decorate(method: MethodT) -> MethodT:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            self._memory.load(*parts)
            return method(self, *args, **kwargs)

        return cast(MethodT, call)

    return decorate


def borrows(part: Part) -> Callable[[MethodT], MethodT]:
    """Decorate a method of a worker with a `_memory`: the part is on the device during it (`PolicyMemory.loaded`)."""

    def decorate(method: MethodT) -> MethodT:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self._memory.loaded(part):
                return method(self, *args, **kwargs)

        return cast(MethodT, call)

    return decorate
