"""The data that the driver passes between the policy, which sends weights, and generation, which loads them.

Published weights stay unchanged while the policy continues to train, and a restarted worker can load them again::

    policy worker (rank 0)                         generation workers
    ─────────────────────                          ──────────────────
    gather a bucket of tensors, cast,
    lay them out in one flat buffer,
    publish it (transport)          ── handles ──►  map or receive the buffer, load the tensors,
    digest over all buckets         ── digest ───►  digest over their own memory, compare, answer

The driver forwards a `WeightUpdate` (a few hundred bytes per tensor, no weights) and compares the digests again.

Streamed weights (see `stream`) are sent bucket by bucket while they are loaded. Gathering, copying and loading overlap,
and the extra memory is a few buckets. The policy waits until the stream ends.

With LoRA, an update may hold only the adapters, and name the base weights that they change (see `adapters`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.distributed.cluster.bundles import Bundle


@dataclass(frozen=True)
class TensorSpec:
    """Locates one tensor in its bucket: Hugging Face parameter name, dtype ("float32"), shape, offset in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class WeightBucket:
    """Describes one flat buffer of `num_bytes` bytes. The transport reaches it by `handle` (a Ray ObjectRef, ...)."""

    tensors: tuple[TensorSpec, ...]
    num_bytes: int
    handle: Any


@dataclass(frozen=True)
class LowRankChange:
    """Describes how an adapter changes a weight W: to W + scaling * B A.

    Attributes:
        weight: name of W among the base weights.
        a, b: names of A [rank, in] and B [out, rank] among the tensors of an update.
        scaling: factor of B A.
        is_transposed: W is [in, out], so the transpose of B A is added.
    """

    weight: str
    a: str
    b: str
    scaling: float
    is_transposed: bool = False


@dataclass(frozen=True)
class BaseWeights:
    """Describes published weights that stay the same, and how adapters change them.

    Attributes:
        buckets: all buckets, as in `WeightUpdate`. A weight that an adapter changes is in `dtype` if this represents it
            exactly, else in float32.
        digest: digest of all tensors in bucket order.
        dtype: dtype of the changed weights.
        changes: the changes by adapters.
    """

    buckets: tuple[WeightBucket, ...]
    digest: str
    dtype: str
    changes: tuple[LowRankChange, ...]


@dataclass(frozen=True)
class WeightUpdate:
    """Describes one published set of weights.

    Attributes:
        version: the training step after which the weights were taken; it grows with every update.
        transport: name of the transport that reads the buckets.
        buckets: all buckets in a fixed order. They hold every parameter once (tied parameters under their first name).
        digest: digest of all tensors in bucket order; see `digest.WeightDigest`. With a base: see
            `adapters.digest_with_base`.
        base: None, or the weights that are changed by the adapters in `buckets`.
    """

    version: int
    transport: str
    buckets: tuple[WeightBucket, ...]
    digest: str
    base: BaseWeights | None = None

    @property
    def tensors(self) -> list[TensorSpec]:
        """The parameters in the order in which `receive` yields them. With a base, the offsets have no meaning."""
        if self.base is None:
            return [spec for bucket in self.buckets for spec in bucket.tensors]
        changed = {change.weight for change in self.base.changes}
        return [
            replace(spec, dtype=self.base.dtype) if spec.name in changed else spec
            for bucket in self.base.buckets
            for spec in bucket.tensors
        ]


@dataclass(frozen=True)
class WeightStream:
    """Tells one receiver where to get weights that are sent while they are loaded.

    Attributes:
        version: see `WeightUpdate`.
        transport: name of the transport that reads the buckets.
        address: address of the sender's socket: a name on its node, or host and port.
        key: shared secret by which sender and receiver authenticate each other.
        stream: number of the sender's stream.
        receiver: number of the receiver in the stream.
    """

    version: int
    transport: str
    address: str | tuple[str, int]
    key: bytes = field(repr=False)
    stream: int
    receiver: int


class WeightOffer(ABC):
    """Offers weights on the driver; receivers may load them until the policy's next training step.

    One stream is open at a time: call `open`, let the receivers load, call `finish`.

    Attributes:
        version: see `WeightUpdate`.
    """

    version: int

    @property
    @abstractmethod
    def digest(self) -> str:
        """See `WeightUpdate`. Raises `WeightSyncError` before the first stream has finished."""

    @property
    @abstractmethod
    def references(self) -> Sequence[Any]:
        """Ray references of the sending calls. Wait for them along with the receivers' calls: either side may fail."""

    @abstractmethod
    def open(self, receivers: Mapping[int, Bundle]) -> dict[int, WeightStream]:
        """Start a stream; returns what each receiver needs to join it.

        Args:
            receivers: the bundle of each receiver, by a number that the caller chooses.

        Raises:
            WeightSyncError: the policy no longer has these weights.
        """

    @abstractmethod
    def leave(self, stream: WeightStream) -> None:
        """Report to the sender that a receiver is dead and may never join."""

    @abstractmethod
    def finish(self) -> str:
        """Wait until everything is sent and return the digest. Raises the sender's error if sending failed."""
