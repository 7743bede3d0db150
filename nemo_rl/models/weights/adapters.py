"""LoRA's weights without sending the base weights at every update.

::

    policy worker (rank 0)                              generation workers
    ──────────────────────                              ──────────────────
    publish the base weights, once    ── handles ──►    at the first update: read and verify them, keep them
    publish A and B of every version  ── handles ──►    read and verify them,
                                                        load W + scaling * B A, layer by layer,
                                                        digest over the loaded memory, compare

Every update names the base weights, so a worker that starts later reads them, too. In shared memory, and in Ray's
object store, the workers of a node share one copy of them.

W + scaling * B A is computed in float32 and rounded once, by the function with which the policy merges its weights for
checkpoints. So loaded weights equal merged ones to the last bit, where both sides multiply matrices alike.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import xxhash

from nemo_rl.models.weights.digest import WeightDigest, digest_tensors, dtype_by_name
from nemo_rl.models.weights.incoming import IncomingWeights, NamedTensors, OnLoaded, in_buckets
from nemo_rl.models.weights.interfaces import BaseWeights, LowRankChange, TensorSpec, WeightBucket, WeightUpdate
from nemo_rl.models.weights.sender import ALIGNMENT, tensor_in


def merge(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    change: LowRankChange,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `weight` with the change by its adapter, computed in float32.

    Args:
        weight: W, in any floating-point dtype.
        a, b: A [rank, in] and B [out, rank] in float32.
        change: how they change W.
        out: receives the result, rounded to its dtype. None: a new float32 tensor.
    """
    product = (b @ a).mul_(change.scaling)
    return torch.add(weight, product.T if change.is_transposed else product, out=out)


def with_base(adapters: WeightUpdate, base: BaseWeights) -> WeightUpdate:
    """Return published adapters as an update of the base weights."""
    return replace(adapters, base=base, digest=digest_with_base(adapters.digest, base.digest, base))


def digest_with_base(adapters: str, weights: str, base: BaseWeights) -> str:
    """Return the digest of an update with adapters: it covers adapters, base weights and how they are merged.

    Args:
        adapters: digest of the tensors A and B.
        weights: digest of the base weights.
        base: their description.
    """
    return xxhash.xxh3_128(repr((adapters, weights, base.dtype, base.changes)).encode()).hexdigest()


class ReceivedBase:
    """Keeps from update to update what a receiver has read and allocated.

    Attributes:
        tensors: the base weights, by name.
        digest: their digest, computed when they arrived.
        memory: the memory of the changed weights, if the receiver computes with it; one buffer per bucket.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.digest = ""
        self.memory: dict[int, torch.Tensor] = {}


class AdaptedWeights(IncomingWeights):
    """Yields base weights with the changes by the adapters of an update, in memory of its own; see `receive`.

    Weights without adapters are views of the base weights on the CPU, and copies on other devices.

    Args:
        update: an update with a base.
        base: what the receiver has kept of earlier updates.
        device: device of the tensors.
        keeps: the receiver computes with the tensors; see `receive`.
        on_loaded: see `receive`.
    """

    def __init__(
        self,
        update: WeightUpdate,
        base: ReceivedBase,
        *,
        device: torch.device,
        keeps: bool,
        on_loaded: OnLoaded | None,
    ) -> None:
        assert update.base is not None
        super().__init__(update, device=device, on_loaded=on_loaded)
        self.digests_on_gpu = device.type != "cpu"
        self._published, self._base, self._received = update, update.base, base
        self._keeps = keeps
        self._reported = ""
        self._arrived = WeightDigest(on_gpu=self.digests_on_gpu)

    def confirm(self, digest: str, *, where: str) -> str:
        """See `IncomingWeights`. The receiver reports the digest of the adapters and base weights that arrived."""
        super().confirm(digest, where=where)
        return self._reported

    def _receive(self) -> NamedTensors:
        self._read_base()
        adapters = self._read_adapters()
        changes = {change.weight: change for change in self._base.changes}
        assert self._arrived is not None
        memory = self._received.memory if self._keeps else {}
        for index, bucket in enumerate(self._base.buckets):
            if not self._keeps:
                self._arrived.settle()  # the memory of the previous bucket is overwritten
            changed = [spec for spec in bucket.tensors if spec.name in changes]
            targets = self._targets(changed, memory, index if self._keeps else 0)
            for spec in bucket.tensors:
                tensor = self._received.tensors[spec.name].to(self._device)
                change = changes.get(spec.name)
                if change is not None:
                    a, b = (adapters[name].to(self._device) for name in (change.a, change.b))
                    tensor = merge(tensor, a, b, change, out=targets[spec.name])
                self._add_arrived(spec.name, tensor)
                yield spec.name, tensor
            if self._on_loaded is not None:
                self._on_loaded(bucket.tensors)
        self._expected = self._arrived.hexdigest()

    def _read_base(self) -> None:
        """Read the base weights, unless the receiver has kept them."""
        base, received = self._base, self._received
        if received.digest == base.digest:
            return
        received.digest, received.tensors = "", {}  # frees those of another policy first
        tensors = self._read(base.buckets)
        digest = digest_tensors(tensors.items())
        self._check(digest, base.digest, "the receiver of the base weights")
        received.digest, received.tensors = digest, tensors

    def _read_adapters(self) -> dict[str, torch.Tensor]:
        adapters = self._read(self._published.buckets)
        self._reported = digest_with_base(digest_tensors(adapters.items()), self._received.digest, self._base)
        self._check(self._reported, self._published.digest)
        return adapters

    def _read(self, buckets: tuple[WeightBucket, ...]) -> dict[str, torch.Tensor]:
        return dict(in_buckets(buckets, [self._buffer(bucket, bucket.num_bytes) for bucket in buckets]))

    def _targets(self, specs: list[TensorSpec], memory: dict[int, torch.Tensor], key: int) -> dict[str, torch.Tensor]:
        """Place changed weights in `memory[key]`, adjacent to each other, so that a decoder can fuse them."""
        dtype = dtype_by_name(self._base.dtype)
        placed, end = [], 0
        for spec in specs:
            placed.append(replace(spec, dtype=self._base.dtype, offset=end))
            end += math.ceil(math.prod(spec.shape) * dtype.itemsize / ALIGNMENT) * ALIGNMENT
        if key not in memory or memory[key].numel() < end:
            memory[key] = torch.empty(end, dtype=torch.uint8, device=self._device)
        return {spec.name: tensor_in(memory[key], spec) for spec in placed}
