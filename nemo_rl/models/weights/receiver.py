"""The receiver of weights: buckets as named tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection

import torch

from nemo_rl.models.weights.adapters import AdaptedWeights, ReceivedBase
from nemo_rl.models.weights.digest import WeightDigest, digest_tensors, dtype_by_name, tensor_bytes
from nemo_rl.models.weights.incoming import IncomingWeights, NamedTensors, OnLoaded, in_buckets, view_of
from nemo_rl.models.weights.interfaces import TensorSpec, WeightBucket, WeightStream, WeightUpdate
from nemo_rl.models.weights.pieces import PieceReader, PiecewiseBucket
from nemo_rl.models.weights.sender import tensor_in
from nemo_rl.models.weights.stream import connect, half_of_the_threads, is_single_threaded, sender_ended


def receive(
    update: WeightUpdate | WeightStream,
    *,
    device: torch.device | str = "cpu",
    verify: bool = True,
    keeps: bool = False,
    on_loaded: OnLoaded | None = None,
    base: ReceivedBase | None = None,
    into: Mapping[str, torch.Tensor] | None = None,
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
        update: published weights, whose views keep their memory alive; or a stream, or published adapters with a base,
            whose tensors are valid until the first tensor of the next bucket is requested.
        device: device of the tensors.
        verify: compare digests over the memory that arrived: for published weights before the first tensor, for a
            stream after the last. Not needed if the receiver compares the digest of its own memory.
        keeps: make the views of a stream keep their memory alive too: the sender's buffers if their contents stay
            unchanged, else copies. This takes memory of the model's size. With adapters, the tensors are valid until
            the next update that gets the same `base`.
        on_loaded: called with the tensors of a bucket after all of them were taken, when the next one is requested.
        base: what is kept of earlier updates with a base. None: nothing.
        into: memory of the receiver, by parameter name. If it can be done at no cost (streams between CPUs), the bytes
            of the tensors are written there, and what is yielded is the tensor in `into`; for a tensor that is
            missing there or differs in dtype or shape, it is new memory. Otherwise `into` is ignored: whatever is
            yielded that is not in `into` must be loaded by the receiver. None: the receiver loads everything.

    Raises:
        WeightSyncError: while iterating: a bucket is missing or too short, the sender has ended, or (with `verify`) the
            digest differs from the sender's. The message has the version and both digests.
    """
    device = torch.device(device)
    if isinstance(update, WeightUpdate) and update.base is not None:
        return AdaptedWeights(update, base or ReceivedBase(), device=device, keeps=keeps, on_loaded=on_loaded)
    return SentWeights(update, device=device, verify=verify, keeps=keeps, on_loaded=on_loaded, into=into)


class SentWeights(IncomingWeights):
    """Yields published or streamed tensors as they are; see `receive`. `digest` is the sender's digest."""

    def __init__(
        self,
        update: WeightUpdate | WeightStream,
        *,
        device: torch.device,
        verify: bool,
        keeps: bool,
        on_loaded: OnLoaded | None,
        into: Mapping[str, torch.Tensor] | None,
    ) -> None:
        super().__init__(update, device=device, on_loaded=on_loaded)
        self.digests_on_gpu = self._transport.on_gpu
        self._verify = verify
        self._keeps = keeps
        needs_no_copy = self._transport.on_gpu == (device.type != "cpu")
        is_stream, on_cpu = isinstance(update, WeightStream), device.type == "cpu" and not self._transport.on_gpu
        self._into = into if is_stream and on_cpu else None
        self._keeps_sent = keeps and needs_no_copy and self._transport.may_be_kept and self._into is None
        if is_stream and (self._keeps_sent or verify or self._into is not None):
            self._arrived = WeightDigest(on_gpu=self.digests_on_gpu)

    def _receive(self) -> NamedTensors:
        if isinstance(self._update, WeightStream):
            yield from self._streamed(self._update)
        else:
            yield from self._published(self._update)

    def _published(self, update: WeightUpdate) -> NamedTensors:
        buffers = [self._buffer(bucket, bucket.num_bytes) for bucket in update.buckets]
        if self._verify:
            self._check(digest_tensors(in_buckets(update.buckets, buffers)), update.digest)
        for bucket, buffer in zip(update.buckets, buffers, strict=True):
            yield from self._local(bucket, buffer)
            if self._on_loaded is not None:
                self._on_loaded(bucket.tensors)
        self._expected = update.digest

    def _streamed(self, stream: WeightStream) -> NamedTensors:
        with contextlib.ExitStack() as stack:
            stack.callback(self._transport.release)
            stack.enter_context(half_of_the_threads())
            piecewise = self._transport.piecewise and (self._keeps_sent or self._into is not None)
            joined = connect(stream, keeps=self._keeps_sent, piecewise=piecewise and is_single_threaded())
            stack.callback(joined.close)
            try:
                connection = stack.enter_context(self._transport.over(joined, sends=False, keeps=self._keeps_sent))
                while isinstance(message := connection.recv(), WeightBucket):
                    if isinstance(message, PiecewiseBucket):
                        yield from self._read_piecewise(connection, message)
                    else:
                        yield from self._loaded(message)
                    del message  # releases the handle, and with it the right to read the memory
                    self._transport.settle()
                    connection.send(None)
            except (OSError, EOFError) as error:
                raise sender_ended(stream) from error
        if self._verify and self._arrived is not None:
            self._check(self._arrived.hexdigest(), message)
        self._expected = message

    def _read_piecewise(self, connection: Connection, bucket: PiecewiseBucket) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a streamed bucket, each as soon as it has arrived."""
        assert self._arrived is not None
        buffer = self._buffer(bucket, bucket.memory_bytes)
        reader = PieceReader(connection, bucket, tensor_bytes(buffer))
        for spec in bucket.tensors:
            tensor = self._target(spec) if self._into is not None else tensor_in(buffer, spec)
            digest = reader.read(spec, None if self._into is None else tensor_bytes(tensor))
            self._arrived.add_digested(spec, digest)
            self._views.append(view_of(spec.name, tensor))
            yield spec.name, tensor
        reader.finish()
        if self._on_loaded is not None:
            self._on_loaded(bucket.tensors)

    def _loaded(self, bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a streamed bucket."""
        buffer = self._buffer(bucket, bucket.num_bytes)
        if self._into is not None:
            yield from self._copied(bucket, buffer)
            return
        yield from self._local(bucket, buffer)
        if self._arrived is not None:
            for name, tensor in in_buckets([bucket], [buffer]):
                self._add_arrived(name, tensor)
            if not self._keeps_sent:
                self._arrived.settle()
        if self._on_loaded is not None:
            self._on_loaded(bucket.tensors)

    def _copied(self, bucket: WeightBucket, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a streamed bucket in the receiver's memory."""
        assert self._arrived is not None
        copies = []
        for spec in bucket.tensors:
            target = self._target(spec)
            self._arrived.copy_in(spec, tensor_in(buffer, spec), target)
            self._views.append(view_of(spec.name, target))
            copies.append((spec.name, target))
        self._arrived.settle()
        yield from copies
        if self._on_loaded is not None:
            self._on_loaded(bucket.tensors)

    def _target(self, spec: TensorSpec) -> torch.Tensor:
        """Return the receiver's memory for a tensor."""
        assert self._into is not None
        target = self._into.get(spec.name)
        dtype = dtype_by_name(spec.dtype)
        fits = (
            target is not None
            and (target.device.type, target.dtype, tuple(target.shape)) == ("cpu", dtype, spec.shape)
            and target.is_contiguous()
        )
        return target if target is not None and fits else torch.empty(spec.shape, dtype=dtype)

    def _local(self, bucket: WeightBucket, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        local = buffer.to(self._device)
        if self._keeps and not self._keeps_sent and local.data_ptr() == buffer.data_ptr():
            local = local.clone()  # the next bucket overwrites the memory
        for spec in bucket.tensors:
            yield spec.name, tensor_in(local, spec)
