"""The generators' side: published buckets as named tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.digest import WeightDigest, check_digest, tensor_bytes
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.models.weights.sender import tensor_in
from nemo_rl.models.weights.transports import make_transport


def receive(
    update: WeightUpdate, *, device: torch.device | str = "cpu", verify: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a published set of weights, in its order.

    On the CPU they are views onto the published memory: shared with other processes, never to be written to, alive
    for as long as any of them is. Elsewhere each bucket is copied to `device` at once, and they are views of the copy.

    Args:
        update: what `publish` returned.
        device: where the tensors are wanted.
        verify: compare the digest over the published memory before the first tensor is handed out. A receiver that
            computes the digest over its own memory afterwards (`digest_tensors`) need not do it twice.

    Raises:
        WeightSyncError: a bucket is gone or too short, or (with `verify`) the digest is not the sender's; the message
            names version, expected and found digest.
    """
    transport = make_transport(update.transport)
    buffers = [transport.get(bucket.handle) for bucket in update.buckets]
    for bucket, buffer in zip(update.buckets, buffers, strict=True):
        if buffer.numel() != bucket.num_bytes:
            raise WeightSyncError(
                f"a bucket of weights of version {update.version} holds {buffer.numel()} bytes instead of "
                f"{bucket.num_bytes}"
            )
    if verify:
        check_digest(
            version=update.version, expected=update.digest, found=_digest(update, buffers), where="the receiver"
        )
    for bucket, buffer in zip(update.buckets, buffers, strict=True):
        local = buffer.to(device)
        for spec in bucket.tensors:
            yield spec.name, tensor_in(local, spec)


def _digest(update: WeightUpdate, buffers: list[torch.Tensor]) -> str:
    digest = WeightDigest()
    for bucket, buffer in zip(update.buckets, buffers, strict=True):
        for spec in bucket.tensors:
            digest.add(spec.name, spec.dtype, spec.shape, tensor_bytes(tensor_in(buffer, spec)))
    return digest.hexdigest()
