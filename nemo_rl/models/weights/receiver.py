"""The receiver of published or streamed weights: buckets as named tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.digest import WeightDigest, check_digest, digest_tensors
from nemo_rl.models.weights.interfaces import TensorSpec, WeightBucket, WeightStream, WeightUpdate
from nemo_rl.models.weights.sender import tensor_in
from nemo_rl.models.weights.stream import connect, half_of_the_threads, sender_ended
from nemo_rl.models.weights.transport import WeightTransport
from nemo_rl.models.weights.transports import make_transport

_Tensors = Generator[tuple[str, torch.Tensor], None, None]
OnLoaded = Callable[[Sequence[TensorSpec]], None]


def receive(
    update: WeightUpdate | WeightStream,
    *,
    device: torch.device | str = "cpu",
    verify: bool = True,
    keeps: bool = False,
    on_loaded: OnLoaded | None = None,
) -> IncomingWeights:
    """Iterate over the tensors of a set of weights once, in its order.

    On the CPU, tensors are views of memory that is shared with other processes: never write to them. On another device,
    each bucket is copied to `device` as a whole, and tensors are views of the copy.

    Example:
        Publish and receive weights within one process::

            update = publish(model.named_parameters(), version=1, dtype="bfloat16", transport="local")
            for name, tensor in receive(update):
                parameters[name].copy_(tensor)

    Args:
        update: published weights, whose views keep their memory alive; or a stream, whose views are valid until the
            first tensor of the next bucket is requested.
        device: device of the tensors.
        verify: compare digests over the memory that arrived: for published weights before the first tensor, for a
            stream after the last. Not needed if the receiver compares the digest of its own memory.
        keeps: make the views of a stream keep their memory alive too: the sender's buffers if their contents stay
            unchanged, else copies. This takes memory of the model's size.
        on_loaded: called with the tensors of a bucket after all of them were taken, when the next one is requested.

    Raises:
        WeightSyncError: while iterating: a bucket is missing or too short, the sender has ended, or (with `verify`) the
            digest differs from the sender's. The message has the version and both digests.
    """
    return IncomingWeights(update, device=torch.device(device), verify=verify, keeps=keeps, on_loaded=on_loaded)


class IncomingWeights:
    """Iterates over names and tensors; afterwards `digest` is the sender's digest. Created by `receive`."""

    def __init__(
        self,
        update: WeightUpdate | WeightStream,
        *,
        device: torch.device,
        verify: bool,
        keeps: bool,
        on_loaded: OnLoaded | None,
    ) -> None:
        self._update = update
        self._device = device
        self._verify = verify
        self._keeps = keeps
        self._on_loaded = on_loaded
        self._transport: WeightTransport = make_transport(update.transport)
        self._sent: str | None = None
        needs_no_copy = self._transport.on_gpu == (device.type != "cpu")
        self._keeps_sent = keeps and needs_no_copy and self._transport.may_be_kept
        self._arrived: WeightDigest | None = None
        self._views: list[tuple[str, int, int]] = []  # name, address and bytes of each tensor that arrived
        if isinstance(update, WeightStream):
            self._tensors = self._streamed(update)
            if self._keeps_sent or verify:
                self._arrived = WeightDigest(on_gpu=self._transport.on_gpu)
        else:
            self._tensors = self._published(update)

    @property
    def digest(self) -> str:
        """The sender's digest. Raises `WeightSyncError` until all tensors have been taken."""
        if self._sent is None:
            raise WeightSyncError(f"not all weights of version {self._update.version} were loaded")
        return self._sent

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
        if self._arrived is not None and self._views == [_view(name, tensor) for name, tensor in named_tensors]:
            return self._arrived.hexdigest()
        return digest_tensors(named_tensors, on_gpu=self._transport.on_gpu)

    def _published(self, update: WeightUpdate) -> _Tensors:
        buffers = [self._buffer(bucket) for bucket in update.buckets]
        if self._verify:
            self._check(digest_tensors(_in_buckets(update.buckets, buffers)), update.digest)
        for bucket, buffer in zip(update.buckets, buffers, strict=True):
            yield from self._local(bucket, buffer)
            if self._on_loaded is not None:
                self._on_loaded(bucket.tensors)
        self._sent = update.digest

    def _streamed(self, stream: WeightStream) -> _Tensors:
        joined = connect(stream, keeps=self._keeps_sent)
        with contextlib.ExitStack() as stack:
            stack.callback(self._transport.release)
            stack.callback(joined.close)
            stack.enter_context(half_of_the_threads())
            try:
                connection = stack.enter_context(self._transport.over(joined, sends=False, keeps=self._keeps_sent))
                while isinstance(message := connection.recv(), WeightBucket):
                    yield from self._loaded(message)
                    del message  # releases the handle, and with it the right to read the memory
                    self._transport.settle()
                    connection.send(None)
            except (OSError, EOFError) as error:
                raise sender_ended(stream) from error
        if self._verify and self._arrived is not None:
            self._check(self._arrived.hexdigest(), message)
        self._sent = message

    def _loaded(self, bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a streamed bucket."""
        buffer = self._buffer(bucket)
        yield from self._local(bucket, buffer)
        if self._arrived is not None:
            for name, tensor in _in_buckets([bucket], [buffer]):
                self._arrived.add_tensor(name, tensor)
                self._views.append(_view(name, tensor))
            if not self._keeps_sent:
                self._arrived.settle()
        if self._on_loaded is not None:
            self._on_loaded(bucket.tensors)

    def _buffer(self, bucket: WeightBucket) -> torch.Tensor:
        buffer = self._transport.get(bucket.handle)
        if buffer.numel() != bucket.num_bytes:
            raise WeightSyncError(
                f"a bucket of weights of version {self._update.version} holds {buffer.numel()} bytes instead of "
                f"{bucket.num_bytes}"
            )
        return buffer

    def _local(self, bucket: WeightBucket, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        local = buffer.to(self._device)
        if self._keeps and not self._keeps_sent and local.data_ptr() == buffer.data_ptr():
            local = local.clone()  # the next bucket overwrites the memory
        for spec in bucket.tensors:
            yield spec.name, tensor_in(local, spec)

    def _check(self, found: str, expected: str) -> None:
        check_digest(version=self._update.version, expected=expected, found=found, where="the receiver")


def _in_buckets(buckets: Iterable[WeightBucket], buffers: Iterable[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket, buffer in zip(buckets, buffers, strict=True):
        for spec in bucket.tensors:
            yield spec.name, tensor_in(buffer, spec)


def _view(name: str, tensor: torch.Tensor) -> tuple[str, int, int]:
    return name, tensor.data_ptr(), tensor.numel() * tensor.element_size()
