"""The policy's side: lay tensors out in flat buckets, publish them, and say what is in them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.digest import WeightDigest, dtype_by_name, dtype_name
from nemo_rl.models.weights.interfaces import TensorSpec, WeightBucket, WeightUpdate
from nemo_rl.models.weights.transports import WeightTransport, make_transport

# Tensors start at multiples of a cache line, which also suits every dtype. Those whose sizes are multiples of it
# lie gap-free one after the other: the decoder multiplies by q, k and v at once without copying them.
ALIGNMENT = 64
DEFAULT_BUCKET_BYTES = 256 * 1024 * 1024


class WeightSender:
    """Publishes a model's weights again and again, and uses the memory again where the transport can.

    Args:
        transport: a name in `nemo_rl.models.weights.transports.TRANSPORTS`.
        bucket_bytes: size of a bucket; a tensor that is larger has a bucket of its own.

    Raises:
        WeightSyncError: there is no such transport.
    """

    def __init__(self, transport: str = "ray", bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        self._name = transport
        self._transport = make_transport(transport)
        self._bucket_bytes = bucket_bytes

    def publish(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int, dtype: str) -> WeightUpdate:
        """Publish a model's weights.

        Args:
            named_tensors: Hugging Face parameter names and tensors on any device, in the model's own order, tied
                parameters once. A generator may gather each tensor as it is asked for: only one bucket is held at a
                time.
            version: of these weights; grows with every call.
            dtype: floating-point tensors are cast to it ("float32", "bfloat16"); others stay as they are.

        Returns:
            What receivers need. The published memory is free again when it and the receivers' tensors are gone: keep
            it until the receivers have answered.

        Raises:
            WeightSyncError: a name comes twice, there is no tensor at all, or dtype is unknown.
        """
        packer = _BucketPacker(dtype_by_name(dtype), self._bucket_bytes, self._transport)
        for name, tensor in named_tensors:
            packer.add(name, tensor.detach())
        buckets, digest = packer.finish()
        if not buckets:
            raise WeightSyncError(f"weights of version {version} hold no tensor")
        return WeightUpdate(version, self._name, buckets, digest)


def publish(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    version: int,
    dtype: str,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    transport: str = "ray",
) -> WeightUpdate:
    """Publish a model's weights once; see `WeightSender`."""
    return WeightSender(transport, bucket_bytes).publish(named_tensors, version=version, dtype=dtype)


class _BucketPacker:
    """Fills one bucket after the other, with a single copy (which also casts and leaves the device) per tensor."""

    def __init__(self, dtype: torch.dtype, bucket_bytes: int, transport: WeightTransport) -> None:
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._transport = transport
        self._digest = WeightDigest()
        self._names: set[str] = set()
        self._pending: list[tuple[TensorSpec, torch.Tensor]] = []
        self._used = 0
        self._buckets: list[WeightBucket] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._names:
            raise WeightSyncError(f"parameter {name!r} is published twice; tied parameters are published once")
        self._names.add(name)
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        num_bytes = tensor.numel() * dtype.itemsize
        offset = math.ceil(self._used / ALIGNMENT) * ALIGNMENT
        if self._pending and offset + num_bytes > self._bucket_bytes:
            self._flush()
            offset = 0
        self._pending.append((TensorSpec(name, dtype_name(dtype), tuple(tensor.shape), offset), tensor))
        self._used = offset + num_bytes

    def finish(self) -> tuple[tuple[WeightBucket, ...], str]:
        """The buckets, and the digest over all of them."""
        if self._pending:
            self._flush()
        return tuple(self._buckets), self._digest.hexdigest()

    def _flush(self) -> None:
        buffer = self._transport.allocate(self._used)
        position = 0
        for spec, tensor in self._pending:
            target = tensor_in(buffer, spec)
            buffer[position : spec.offset].zero_()
            self._digest.copy_in(spec, tensor, target)
            position = spec.offset + target.numel() * target.element_size()
        self._digest.settle()
        handle = self._transport.put(buffer)
        self._buckets.append(WeightBucket(tuple(spec for spec, _ in self._pending), self._used, handle))
        self._pending, self._used = [], 0


def tensor_in(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor that `spec` describes, as a view into its bucket's buffer."""
    dtype = dtype_by_name(spec.dtype)
    num_bytes = math.prod(spec.shape) * dtype.itemsize
    return buffer[spec.offset : spec.offset + num_bytes].view(dtype).view(spec.shape)
