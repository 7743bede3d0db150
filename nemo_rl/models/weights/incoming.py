"""The base class of weights that arrive: named tensors, and the digest that the memory loaded from them must have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.digest import WeightDigest, check_digest, digest_tensors
from nemo_rl.models.weights.interfaces import TensorSpec, WeightBucket, WeightStream, WeightUpdate
from nemo_rl.models.weights.sender import tensor_in
from nemo_rl.models.weights.transport import WeightTransport
from nemo_rl.models.weights.transports import make_transport

NamedTensors = Generator[tuple[str, torch.Tensor], None, None]
OnLoaded = Callable[[Sequence[TensorSpec]], None]


class IncomingWeights(ABC):
    """Iterates over names and tensors. Created by `receive`.

    Attributes:
        digests_on_gpu: how `digest` is computed; see `WeightDigest`.
    """

    digests_on_gpu: bool

    def __init__(
        self, update: WeightUpdate | WeightStream, *, device: torch.device, on_loaded: OnLoaded | None
    ) -> None:
        self._update = update
        self._device = device
        self._on_loaded = on_loaded
        self._transport: WeightTransport = make_transport(update.transport)
        self._expected: str | None = None
        self._arrived: WeightDigest | None = None
        self._views: list[tuple[str, int, int]] = []  # name, address and bytes of each tensor in `_arrived`
        self._tensors = self._receive()

    @abstractmethod
    def _receive(self) -> NamedTensors:
        """Yield the tensors, then set `_expected`."""

    @property
    def digest(self) -> str:
        """The digest that the receiver's own memory must have. Raises `WeightSyncError` until all tensors are taken."""
        if self._expected is None:
            raise WeightSyncError(f"not all weights of version {self._update.version} were loaded")
        return self._expected

    def __iter__(self) -> IncomingWeights:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        return next(self._tensors)

    def close(self) -> None:
        """Leave a stream before its end, so that its sender stops waiting."""
        self._tensors.close()

    def digest_of(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        """Return the digest of the receiver's own memory after everything has been loaded.

        If these tensors are the memory that arrived (`keeps`), the digest computed on arrival is returned.
        """
        named_tensors = list(named_tensors)
        if self._arrived is not None and self._views == [view_of(name, tensor) for name, tensor in named_tensors]:
            return self._arrived.hexdigest()
        return digest_tensors(named_tensors, on_gpu=self.digests_on_gpu)

    def confirm(self, digest: str, *, where: str) -> str:
        """Compare the digest of the receiver's own memory with `digest`; return what the receiver reports.

        Args:
            digest: digest of the receiver's own memory.
            where: the receiver, for the message.

        Raises:
            WeightSyncError: the digests differ.
        """
        check_digest(version=self._update.version, expected=self.digest, found=digest, where=where)
        return digest

    def _add_arrived(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor to `_arrived`."""
        assert self._arrived is not None
        self._arrived.add_tensor(name, tensor)
        self._views.append(view_of(name, tensor))

    def _buffer(self, bucket: WeightBucket, num_bytes: int) -> torch.Tensor:
        buffer = self._transport.get(bucket.handle)
        if buffer.numel() != num_bytes:
            raise WeightSyncError(
                f"a bucket of weights of version {self._update.version} holds {buffer.numel()} bytes instead of "
                f"{num_bytes}"
            )
        return buffer

    def _check(self, found: str, expected: str, where: str = "the receiver") -> None:
        check_digest(version=self._update.version, expected=expected, found=found, where=where)


def in_buckets(buckets: Iterable[WeightBucket], buffers: Iterable[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors, which are views of the buffers of the buckets."""
    for bucket, buffer in zip(buckets, buffers, strict=True):
        for spec in bucket.tensors:
            yield spec.name, tensor_in(buffer, spec)


def view_of(name: str, tensor: torch.Tensor) -> tuple[str, int, int]:
    """Return name, address and bytes of a tensor."""
    return name, tensor.data_ptr(), tensor.numel() * tensor.element_size()
