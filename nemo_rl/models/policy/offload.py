"""What a policy worker holds on its device, and how it makes room for generation on the same one.

A model with P parameters takes, per worker (its share of them where they are sharded)::

    part              torch          Megatron, bfloat16             without it on the device
    WEIGHTS           4 P bytes      2 P                            copied to the host
    OPTIMIZER         8 P            12 P / data-parallel workers   copied to the host
    GRADIENTS         4 P            4 P (float32 reduction)        dropped: nothing is kept between two calls
    REFERENCE         4 P            2 P                            copied to the host once: it never changes

Calls say what they need (`needs`), which brings it back; `PolicyMemory.offload` lets it leave. Memory leaves by
storage: parameters, views and tied weights stay the very objects that modules, buffers of gradients and optimizers
hold, and a storage that several share moves once. On CPUs all of this happens just the same, between two places of one
memory.

megatron-core's own helpers are used for its buffers of gradients only. Those for weights and optimizer states cover the
distributed optimizer alone, replace tensors instead of moving them (a float32 optimizer steps views of the weights),
and wait for pageable memory.
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

# Pinned memory is rounded up to a power of two, and a chunk is one already.
_CHUNK_BYTES = 256 << 20
_ALIGNMENT = 256
_GIB = 1 << 30

Tensors = Callable[[], Iterable[torch.Tensor]]


class Part(StrEnum):
    """What moves as a whole."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer state"
    REFERENCE = "weights of the reference policy"


class Movable(Protocol):
    """A part that can leave the device."""

    def leave(self) -> None:
        """Free its memory on the device. When it raises, nothing has left."""

    def come_back(self) -> None:
        """Take memory again, and begin to fill it. When it raises, nothing has come back."""

    def wait(self) -> None:
        """Let what is computed from now on wait until it is filled; does not block this thread."""


@dataclass(frozen=True)
class Scratch:
    """A part whose contents nobody needs once it leaves. `release` may be called when there is nothing to release."""

    release: Callable[[], object]
    regain: Callable[[], object] = lambda: None

    def leave(self) -> None:
        self.release()

    def come_back(self) -> None:
        self.regain()

    def wait(self) -> None:
        """What `regain` takes is there when it returns."""


@dataclass(frozen=True)
class _Place:
    """A storage of `num_bytes`, which the host keeps from `offset` on."""

    storage: torch.UntypedStorage
    num_bytes: int
    offset: int


class StoredTensors:
    """Tensors whose memory leaves and comes back with its contents.

    Copies run on a stream of their own, to and from pinned memory that is used again every time.

    Args:
        tensors: gives those there are now; asked each time they leave. Shards count, not whole sharded tensors.
        device: where all of them are.
        constant: their contents never change, so one copy serves for good.
    """

    def __init__(self, tensors: Tensors, device: torch.device, *, constant: bool = False) -> None:
        self._tensors = tensors
        self._device = device
        self._constant = constant
        self._host = _HostMemory(pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: list[_Place] = []
        self._is_copied = False

    def leave(self) -> None:
        self._places = list(_places(self._tensors()))
        if not (self._constant and self._is_copied):
            self._host.reserve(sum(place.num_bytes + _ALIGNMENT for place in self._places))
            with self._copying():
                for place in self._places:
                    for on_host, on_device in self._pieces(place):
                        on_host.copy_(on_device, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
            self._is_copied = True
        for place in self._places:
            place.storage.resize_(0)

    def come_back(self) -> None:
        try:
            for place in self._places:
                place.storage.resize_(place.num_bytes)
        except torch.OutOfMemoryError:
            for place in self._places:
                place.storage.resize_(0)
            raise
        with self._copying():
            for place in self._places:
                for on_host, on_device in self._pieces(place):
                    on_device.copy_(on_host, non_blocking=True)

    def wait(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        # Memory that is taken anew may have been somebody else's until what runs now is done.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _pieces(self, place: _Place) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A storage's memory on the host and on the device, byte by byte, cut where the host's is."""
        on_device = torch.empty(0, dtype=torch.uint8, device=self._device).set_(place.storage)
        start = 0
        for on_host in self._host.pieces(place.offset, place.num_bytes):
            yield on_host, on_device[start : start + len(on_host)]
            start += len(on_host)


class _HostMemory:
    """Memory of the host in chunks; it only grows."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._chunks: list[torch.Tensor] = []
        self._starts: list[int] = []
        self._num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Have at least so much. Raises `TrainingError` when the host has not got it."""
        while self._num_bytes < num_bytes:
            size = min(_CHUNK_BYTES, num_bytes - self._num_bytes)
            try:
                chunk = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            except RuntimeError as error:
                raise TrainingError(
                    f"policy.offload needs {num_bytes / _GIB:.1f} GiB of this node's memory for one worker's tensors, "
                    f"and it gives {self._num_bytes / _GIB:.1f} GiB: {error}. Shard the policy over more workers, or "
                    "set policy.offload=false"
                ) from error
            self._chunks.append(chunk)
            self._starts.append(self._num_bytes)
            self._num_bytes += size

    def pieces(self, offset: int, num_bytes: int) -> Iterator[torch.Tensor]:
        """The bytes from `offset` on, in parts that do not cross from one chunk to the next."""
        index = bisect.bisect_right(self._starts, offset) - 1
        while num_bytes:
            piece = self._chunks[index][offset - self._starts[index] :][:num_bytes]
            yield piece
            offset += len(piece)
            num_bytes -= len(piece)
            index += 1


def _places(tensors: Iterable[torch.Tensor]) -> Iterator[_Place]:
    """Each storage that has memory of its own once, in the order of the tensors.

    Some memory of a CPU cannot leave, and stays: that of a file, and what numpy has looked at.
    """
    seen: set[int] = set()
    offset = 0
    for tensor in tensors:
        local = tensor.detach()
        storage = (local.to_local() if isinstance(local, DTensor) else local).untyped_storage()
        num_bytes = storage.nbytes()
        if num_bytes and storage.resizable() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield _Place(storage, num_bytes, offset)
            offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class PolicyMemory:
    """The parts of one worker and where they are.

    Attributes:
        is_shared: `offload` has been called, so somebody else wants the memory, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_shared = False
        self._device = device
        self._parts: dict[Part, Movable] = {}
        self._away: set[Part] = set()

    def add(self, part: Part, movable: Movable) -> None:
        """Take charge of a part, which is on the device."""
        self._parts[part] = movable

    def is_here(self, part: Part) -> bool:
        """Whether it is on the device; a part that there is not yet is not."""
        return part in self._parts and part not in self._away

    def guard(self, module: nn.Module, part: Part) -> None:
        """Make calls of `module` a `ModelError` while its weights, which are `part`, are away.

        Kernels would read from address 0 instead.
        """
        # Weakly: parts know the optimizer, which knows megatron-core's wrapper, whose hooks on gradients are held in
        # C++. Python's garbage collector does not see that circle: the model would stay as long as the process.
        memory = weakref.proxy(self)

        def check(*_: Any) -> None:
            if not memory.is_here(part):
                raise ModelError(f"the {part} are in the host's memory: this call did not say that it needs them")

        module.register_forward_pre_hook(check, prepend=True)  # before FSDP gathers them

    def offload(self, *, keep_weights: bool = False) -> None:
        """Let everything leave, the weights unless they are kept. What is away already stays there.

        Raises:
            TrainingError: the host has not enough memory.
        """
        self.is_shared = True
        self._leave(part for part in self._parts if not (keep_weights and part == Part.WEIGHTS))

    def expect(self, *parts: Part) -> None:
        """Begin to bring parts back; `need` comes before they are used.

        Raises:
            TrainingError: the device has not enough memory.
        """
        for part in parts:
            if part in self._away:
                try:
                    self._parts[part].come_back()
                except torch.OutOfMemoryError as error:
                    raise TrainingError(
                        f"the policy's {part} do not fit back on {self._device}: {error}. Generation keeps too much "
                        "while it sleeps, or the batch is too large: lower policy.train_micro_batch_size, or shard the "
                        "policy over more workers"
                    ) from error
                self._away.discard(part)

    def need(self, *parts: Part) -> None:
        """Have parts on the device, for whatever is computed from now on. Raises like `expect`."""
        self.expect(*parts)
        for part in parts:
            self._parts[part].wait()

    @contextlib.contextmanager
    def lend(self, part: Part) -> Iterator[None]:
        """Have a part, which the block may add, while the block runs; where memory is shared it leaves again if it was
        not here."""
        was_here = self.is_here(part)
        if part in self._parts:
            self.need(part)
        try:
            yield
        finally:
            if self.is_shared and not was_here and part in self._parts:
                self._leave([part])

    def _leave(self, parts: Iterable[Part]) -> None:
        leaving = [part for part in parts if part not in self._away]
        if not leaving:
            return
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self._device)  # streams of collectives may still read them
        for part in leaving:
            self._parts[part].leave()
            self._away.add(part)
        if on_gpu:
            torch.cuda.ipc_collect()  # of weights that were sent
            torch.cuda.empty_cache()  # other processes cannot take what the allocator keeps
        logger.debug("on the host now: %s", ", ".join(leaving))


MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def needs(*parts: Part) -> Callable[[MethodT], MethodT]:
    """For methods of workers that have a `_memory`: these parts are on the device when it begins, and stay there."""

    def decorate(method: MethodT) -> MethodT:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            self._memory.need(*parts)
            return method(self, *args, **kwargs)

        return cast(MethodT, call)

    return decorate


def borrows(part: Part) -> Callable[[MethodT], MethodT]:
    """For methods of workers that have a `_memory`: the part is there while it runs; see `PolicyMemory.lend`."""

    def decorate(method: MethodT) -> MethodT:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self._memory.lend(part):
                return method(self, *args, **kwargs)

        return cast(MethodT, call)

    return decorate
