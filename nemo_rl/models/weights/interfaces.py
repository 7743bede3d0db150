"""How weights travel from policy to generation: the one contract that every transport fulfils.

Published: they stay as they are while the policy trains on, and whoever starts anew can load them again.

    policy worker (rank 0)                         generation workers
    ─────────────────────                          ──────────────────
    gather a bucket of tensors, cast,
    lay them out in one flat buffer,
    publish it (transport)          ── handles ──►  map or receive the buffer, load the tensors,
    digest over all buckets         ── digest ───►  digest over their own memory, compare, answer

The driver passes `WeightUpdate` along (a few hundred bytes per tensor, no weights) and compares the digests again.

Streamed (see `stream`): sent bucket by bucket while they are loaded, so that a few buckets are all the memory that it
takes, and gathering, copying and loading go on at the same time. The policy has to wait meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.distributed.cluster.bundles import Bundle


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies in its bucket: Hugging Face parameter name, dtype ("float32"), shape, byte offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class WeightBucket:
    """One flat buffer of `num_bytes` bytes; `handle` is what the transport needs to reach it (a Ray ObjectRef, ...)."""

    tensors: tuple[TensorSpec, ...]
    num_bytes: int
    handle: Any


@dataclass(frozen=True)
class WeightUpdate:
    """One published set of weights.

    Attributes:
        version: the training step after which they were taken; grows with every update.
        transport: name of the transport that reads the buckets.
        buckets: in a fixed order, together every parameter once (tied parameters once, under their first name).
        digest: of every tensor, in bucket order; see `digest.WeightDigest`.
    """

    version: int
    transport: str
    buckets: tuple[WeightBucket, ...]
    digest: str


@dataclass(frozen=True)
class WeightStream:
    """Where one receiver gets weights that are sent while they are loaded.

    Attributes:
        version: as of `WeightUpdate`.
        transport: name of the transport that reads the buckets.
        address: of the sender's socket: a name on its node, or host and port.
        key: what proves to the sender that the receiver may ask, and to the receiver that the sender is the one.
        stream: which of the sender's streams.
        receiver: which of its receivers.
    """

    version: int
    transport: str
    address: str | tuple[str, int]
    key: bytes = field(repr=False)
    stream: int
    receiver: int


class WeightOffer(ABC):
    """On the driver: weights that are sent whenever receivers ask for them, until the policy trains on.

    A stream at a time: `open`, let the receivers load, `finish`.

    Attributes:
        version: as of `WeightUpdate`.
    """

    version: int

    @property
    @abstractmethod
    def digest(self) -> str:
        """As of `WeightUpdate`. Raises `WeightSyncError` before they have been sent once."""

    @property
    @abstractmethod
    def references(self) -> Sequence[Any]:
        """Ray's references to the sending calls: waited for beside the receivers', because either side may fail."""

    @abstractmethod
    def open(self, receivers: Mapping[int, Bundle]) -> dict[int, WeightStream]:
        """Begin to send to receivers, whatever their numbers, on these bundles; what each of them needs to join.

        Raises:
            WeightSyncError: the policy has other weights by now.
        """

    @abstractmethod
    def leave(self, stream: WeightStream) -> None:
        """Tell the sender that a receiver is dead, and may never have joined."""

    @abstractmethod
    def finish(self) -> str:
        """Wait until all has been sent; the digest. Raises what made the sending fail."""
