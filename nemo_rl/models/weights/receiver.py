"""The generators' side: published or streamed buckets as named tensors."""

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
    """The tensors of a set of weights, in its order; to be iterated once.

    On the CPU they are views onto memory that is shared with other processes, never to be written to. Elsewhere each
    bucket is copied to `device` at once, and they are views of the copy.

    Args:
        update: published weights, whose views live for as long as any of them is; or a stream, whose views are good
            until the next bucket is asked for.
        device: where the tensors are wanted.
        verify: compare the digest over what arrived: of published weights before the first tensor is handed out, of a
            stream after the last. A receiver that computes the digest over its own memory need not do it twice.
        keeps: of a stream too, views live for as long as any of them is: in what was sent, where it stays as it is, or
            else in copies. The memory is then one of the model's size.
        on_loaded: called with the tensors of each bucket when they have been taken and more is asked for.

    Raises:
        WeightSyncError: while iterating: a bucket is gone or too short, the sender has ended, or (with `verify`) the
            digest is not the sender's; the message names version, expected and found digest.
    """
    return IncomingWeights(update, torch.device(device), verify, keeps, on_loaded)


class IncomingWeights:
    """What `receive` returns: iterate it for names and tensors; then `digest` is what the sender computed."""

    def __init__(
        self,
        update: WeightUpdate | WeightStream,
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
        is_there = self._transport.on_gpu == (device.type != "cpu")  # what is sent lies where it is wanted
        self._keeps_sent = keeps and is_there and self._transport.may_be_kept
        self._arrived: WeightDigest | None = None
        self._views: list[tuple[str, int, int]] = []  # that arrived: name, address, bytes
        if isinstance(update, WeightStream):
            self._tensors = self._streamed(update)
            if self._keeps_sent or verify:
                self._arrived = WeightDigest(on_gpu=self._transport.on_gpu)
        else:
            self._tensors = self._published(update)

    @property
    def digest(self) -> str:
        """The sender's digest. Raises `WeightSyncError` before all tensors have been taken."""
        if self._sent is None:
            raise WeightSyncError(f"not all weights of version {self._update.version} were loaded")
        return self._sent

    def __iter__(self) -> IncomingWeights:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        return next(self._tensors)

    def close(self) -> None:
        """Leave a stream that was not taken to its end: its sender does not wait any longer."""
        self._tensors.close()

    def digest_of(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        """The digest over a receiver's own memory, when all has been loaded.

        What a receiver that `keeps` the arrived memory computes with was read when it arrived, and is not read again.
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
                    del message  # and with it the right to read the memory
                    self._transport.settle()
                    connection.send(None)
            except (OSError, EOFError) as error:
                raise sender_ended(stream) from error
        if self._verify and self._arrived is not None:
            self._check(self._arrived.hexdigest(), message)
        self._sent = message

    def _loaded(self, bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a streamed bucket."""
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
            local = local.clone()  # the memory will be another bucket's
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
