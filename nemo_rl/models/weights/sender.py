"""The sender of weights: packs tensors into flat buckets and publishes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.digest import WeightDigest, dtype_by_name, dtype_name
from nemo_rl.models.weights.interfaces import TensorSpec, WeightBucket, WeightUpdate
from nemo_rl.models.weights.transport import WeightTransport
from nemo_rl.models.weights.transports import make_transport

# Tensors start at multiples of a cache line, which aligns every dtype. Tensors whose sizes are multiples of it are
# adjacent, so the decoder can multiply by q, k and v at once without copying them.
ALIGNMENT = 64
DEFAULT_BUCKET_BYTES = 256 * 1024 * 1024


class WeightSender:
    """Publishes successive versions of a model's weights and reuses memory if the transport can.

    Example:
        Within one process::

            sender = WeightSender("local")
            update = sender.publish(model.named_parameters(), version=1, dtype="bfloat16")

    Args:
        transport: a name in `nemo_rl.models.weights.transports.TRANSPORTS`.
        bucket_bytes: size of a bucket; a larger tensor gets a bucket to itself.

    Raises:
        WeightSyncError: the transport is unknown.
    """

    def __init__(self, transport: str = "ray", bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        self._name = transport
        self._transport = make_transport(transport)
        self._bucket_bytes = bucket_bytes

    def publish(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int, dtype: str | None
    ) -> WeightUpdate:
        """Publish a model's weights.

        Args:
            named_tensors: Hugging Face parameter names and tensors on any device, in the model's order, tied
                parameters once. A generator may gather each tensor when it is requested: at most one bucket of them is
                held at a time.
            version: version of these weights; it grows with every call.
            dtype: floating-point tensors are cast to it ("float32", "bfloat16"); other tensors keep their dtype. None:
                all tensors do.

        Returns:
            What receivers need. The published memory is freed when the update and the receivers' tensors are deleted:
            keep the update until the receivers have answered.

        Raises:
            WeightSyncError: a name occurs twice, there are no tensors, or dtype is unknown.
        """
        buckets: list[WeightBucket] = []
        cast_to = None if dtype is None else dtype_by_name(dtype)
        packer = BucketPacker(cast_to, self._bucket_bytes, self._transport, buckets.append)
        digest = packer.pack(named_tensors, version)
        return WeightUpdate(version, self._name, tuple(buckets), digest)


def publish(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    version: int,
    dtype: str,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    transport: str = "ray",
) -> WeightUpdate:
    """Publish a model's weights once; see `WeightSender`.

    Example:
        Within one process::

            update = publish(model.named_parameters(), version=1, dtype="float32", transport="local")
    """
    return WeightSender(transport, bucket_bytes).publish(named_tensors, version=version, dtype=dtype)


class BucketPacker:
    """Fills buckets one by one. A single copy per tensor casts it and moves it to the bucket's device.

    Args:
        dtype: floating-point tensors are cast to it. None: they keep theirs.
        bucket_bytes: size of a bucket; a larger tensor gets a bucket to itself.
        transport: allocates the buckets.
        emit: called with each full bucket.
        keep_modules: keep the parameters of one module in one bucket, even if it exceeds `bucket_bytes`. A receiver can
            then multiply by several projections at once.
    """

    def __init__(
        self,
        dtype: torch.dtype | None,
        bucket_bytes: int,
        transport: WeightTransport,
        emit: Callable[[WeightBucket], None],
        *,
        keep_modules: bool = False,
    ) -> None:
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._transport = transport
        self._emit = emit
        self._keep_modules = keep_modules
        self._digest = WeightDigest(on_gpu=transport.on_gpu)
        self._names: set[str] = set()
        self._pending: list[tuple[TensorSpec, torch.Tensor]] = []
        self._used = 0

    def pack(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """Pack all tensors and return their digest. Raises the errors of `WeightSender.publish`."""
        for name, tensor in named_tensors:
            self._add(name, tensor.detach())
        if not self._names:
            raise WeightSyncError(f"weights of version {version} contain no tensors")
        if self._pending:
            self._flush()
        return self._digest.hexdigest()

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._names:
            raise WeightSyncError(f"parameter {name!r} is published twice; tied parameters are published once")
        self._names.add(name)
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        num_bytes = tensor.numel() * dtype.itemsize
        offset = math.ceil(self._used / ALIGNMENT) * ALIGNMENT
        if self._pending and offset + num_bytes > self._bucket_bytes and not self._continues_module(name):
            self._flush()
            offset = 0
        self._pending.append((TensorSpec(name, dtype_name(dtype), tuple(tensor.shape), offset), tensor))
        self._used = offset + num_bytes

    def _continues_module(self, name: str) -> bool:
        return self._keep_modules and _module_of(name) == _module_of(self._pending[-1][0].name)

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
        bucket = WeightBucket(tuple(spec for spec, _ in self._pending), self._used, handle)
        self._pending, self._used = [], 0
        self._emit(bucket)


def _module_of(name: str) -> str:
    """Return `model.layers.0.mlp` for `model.layers.0.mlp.up_proj.weight`."""
    return name.rsplit(".", 2)[0]


def tensor_in(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return the tensor that `spec` describes, as a view of its bucket's buffer."""
    dtype = dtype_by_name(spec.dtype)
    num_bytes = math.prod(spec.shape) * dtype.itemsize
    return buffer[spec.offset : spec.offset + num_bytes].view(dtype).view(spec.shape)
