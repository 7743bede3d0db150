"""How weights travel from policy to generation: the one contract that every transport fulfils.

    policy worker (rank 0)                         generation workers
    ─────────────────────                          ──────────────────
    gather a bucket of tensors, cast,
    lay them out in one flat buffer,
    publish it (transport)          ── handles ──►  map or receive the buffer, load the tensors,
    digest over all buckets         ── digest ───►  digest over their own memory, compare, answer

The driver passes `WeightUpdate` along (a few hundred bytes per tensor, no weights) and compares the digests again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
