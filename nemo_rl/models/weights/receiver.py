"""The receiver of weights: buckets as named tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nemo_rl.models.weights.adapters import AdaptedWeights, ReceivedBase
from nemo_rl.models.weights.digest import WeightDigest, digest_tensors
from nemo_rl.models.weights.incoming import IncomingWeights, NamedTensors, OnLoaded, in_buckets
from nemo_rl.models.weights.interfaces import WeightBucket, WeightStream, WeightUpdate
from nemo_rl.models.weights.sender import tensor_in
from nemo_rl.models.weights.stream import connect, half_of_the_threads, sender_ended


def receive(
    update: WeightUpdate | WeightStream,
    *,
    device: torch.device | str = "cpu",
    verify: bool = True,
    keeps: bool = False,
    on_loaded: OnLoaded | None = None,
    base: ReceivedBase | None = None,
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

    Raises:
        WeightSyncError: while iterating: a bucket is missing or too short, the sender has ended, or (with `verify`) the
            digest differs from the sender's. The message has the version and both digests.
    """
    device = torch.device(device)
    if isinstance(update, WeightUpdate) and update.base is not None:
        return AdaptedWeights(update, base or ReceivedBase(), device=device, keeps=keeps, on_loaded=on_loaded)
    return SentWeights(update, device=device, verify=verify, keeps=keeps, on_loaded=on_loaded)


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
    ) -> None:
        super().__init__(update, device=device, on_loaded=on_loaded)
        self.digests_on_gpu = self._transport.on_gpu
        self._verify = verify
        self._keeps = keeps
        needs_no_copy = self._transport.on_gpu == (device.type != "cpu")
        self._keeps_sent = keeps and needs_no_copy and self._transport.may_be_kept
        if isinstance(update, WeightStream) and (self._keeps_sent or verify):
            self._arrived = WeightDigest(on_gpu=self.digests_on_gpu)

    def _receive(self) -> NamedTensors:
        if isinstance(self._update, WeightStream):
            yield from self._streamed(self._update)
        else:
            yield from self._published(self._update)

    def _published(self, update: WeightUpdate) -> NamedTensors:
        buffers = [self._buffer(bucket) for bucket in update.buckets]
        if self._verify:
            self._check(digest_tensors(in_buckets(update.buckets, buffers)), update.digest)
        for bucket, buffer in zip(update.buckets, buffers, strict=True):
            yield from self._local(bucket, buffer)
            if self._on_loaded is not None:
                self._on_loaded(bucket.tensors)
        self._expected = update.digest

    def _streamed(self, stream: WeightStream) -> NamedTensors:
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
        self._expected = message

    def _loaded(self, bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a streamed bucket."""
        buffer = self._buffer(bucket)
        yield from self._local(bucket, buffer)
        if self._arrived is not None:
            for name, tensor in in_buckets([bucket], [buffer]):
                self._add_arrived(name, tensor)
            if not self._keeps_sent:
                self._arrived.settle()
        if self._on_loaded is not None:
            self._on_loaded(bucket.tensors)

    def _local(self, bucket: WeightBucket, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        local = buffer.to(self._device)
        if self._keeps and not self._keeps_sent and local.data_ptr() == buffer.data_ptr():
            local = local.clone()  # the next bucket overwrites the memory
        for spec in bucket.tensors:
            yield spec.name, tensor_in(local, spec)
