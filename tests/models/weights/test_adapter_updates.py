"""Updates with adapters: equal to merged weights, base weights read once, both verified, exact bytes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.adapters import ReceivedBase, merge, with_base
from nemo_rl.models.weights.digest import digest_tensors
from nemo_rl.models.weights.interfaces import BaseWeights, LowRankChange, TensorSpec, WeightBucket, WeightUpdate
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.weights.sender import WeightSender

CHANGES = (
    LowRankChange("q.weight", "q.A", "q.B", scaling=1.5),
    LowRankChange("v.weight", "v.A", "v.B", scaling=0.3),
    LowRankChange("conv.weight", "conv.A", "conv.B", scaling=2.0, is_transposed=True),
)
SHAPES = {"q.weight": (32, 16), "k.weight": (8, 16), "v.weight": (8, 16), "conv.weight": (16, 48), "norm": (16,)}
RANK = 4


def random_weights() -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}


def random_adapters(seed: int = 1) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    tensors = {}
    for change in CHANGES:
        rows, columns = SHAPES[change.weight][:: -1 if change.is_transposed else 1]
        tensors[change.a] = torch.randn(RANK, columns, generator=draws)
        tensors[change.b] = torch.randn(rows, RANK, generator=draws)
    return tensors


class Publisher:
    """Publishes the weights once, and adapters of any version."""

    def __init__(self, transport: str = "local", dtype: str = "float32") -> None:
        self.sender = WeightSender(transport, bucket_bytes=2048)
        changed = {change.weight for change in CHANGES}
        weights = {
            name: tensor if name in changed else tensor.to(getattr(torch, dtype))
            for name, tensor in random_weights().items()
        }
        published = self.sender.publish(weights.items(), version=0, dtype=None)
        self.base = BaseWeights(published.buckets, published.digest, dtype, CHANGES)

    def update(self, version: int = 1, seed: int = 1, base: BaseWeights | None = None) -> WeightUpdate:
        adapters = self.sender.publish(random_adapters(seed).items(), version=version, dtype="float32")
        return with_base(adapters, base or self.base)


def expected(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors, adapters = random_weights(), random_adapters(seed)
    for change in CHANGES:
        product = adapters[change.b] @ adapters[change.a] * change.scaling
        tensors[change.weight] += product.T if change.is_transposed else product
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def without_bytes(buckets: tuple[WeightBucket, ...]) -> tuple[WeightBucket, ...]:
    return tuple(replace(bucket, handle=torch.empty(0, dtype=torch.uint8)) for bucket in buckets)


def damaged(buckets: tuple[WeightBucket, ...]) -> tuple[WeightBucket, ...]:
    buffers = [bucket.handle.clone() for bucket in buckets]
    buffers[-1][-1] ^= 1
    return tuple(replace(bucket, handle=buffer) for bucket, buffer in zip(buckets, buffers, strict=True))


def received(update: WeightUpdate, base: ReceivedBase | None = None) -> dict[str, torch.Tensor]:
    """Copy each tensor before the next one is requested, as a receiver with memory of its own does."""
    return {name: tensor.clone() for name, tensor in receive(update, base=base)}


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "transport",
    ["local", pytest.param("shared_memory", marks=pytest.mark.skipif(sys.platform != "linux", reason="needs memfd"))],
)
def test_received_weights_equal_merged_ones(transport: str, dtype: str, keeps: bool) -> None:
    publisher, base = Publisher(transport, dtype), ReceivedBase()
    places = []
    for version, seed in ((1, 1), (2, 5)):
        update = publisher.update(version, seed)
        loaded: list[TensorSpec] = []
        weights = receive(update, base=base, keeps=keeps, on_loaded=loaded.extend)
        found = dict(weights) if keeps else {name: tensor.clone() for name, tensor in weights}
        merged = expected(seed, getattr(torch, dtype))
        assert list(found) == [spec.name for spec in loaded] == list(SHAPES) == [spec.name for spec in update.tensors]
        for spec in update.tensors:
            assert torch.equal(found[spec.name], merged[spec.name]), spec.name
            assert found[spec.name].dtype == merged[spec.name].dtype == getattr(torch, spec.dtype)
        assert weights.confirm(weights.digest_of(found.items()), where="here") == update.digest
        assert weights.digest == digest_tensors(merged.items())
        places.append({name: tensor.data_ptr() for name, tensor in found.items()})
    assert (places[0] == places[1]) == keeps, "new memory costs a page fault per page"


def test_base_weights_are_read_once() -> None:
    publisher, base = Publisher(), ReceivedBase()
    assert received(publisher.update(), base)
    unreadable = replace(publisher.base, buckets=without_bytes(publisher.base.buckets))
    update = publisher.update(version=2, seed=3, base=unreadable)
    assert torch.equal(received(update, base)["q.weight"], expected(3, torch.float32)["q.weight"])
    with pytest.raises(WeightSyncError, match="a bucket of weights of version 2 holds 0 bytes"):
        received(update)  # as a restarted worker


def test_base_weights_of_another_policy_are_read() -> None:
    publisher, base = Publisher(), ReceivedBase()
    received(publisher.update(), base)
    weights = [(name, tensor + 1) for name, tensor in random_weights().items()]
    published = publisher.sender.publish(weights, version=0, dtype=None)
    other = BaseWeights(published.buckets, published.digest, "float32", CHANGES)
    found = received(publisher.update(base=other), base)
    assert torch.equal(found["norm"], random_weights()["norm"] + 1)


def test_digest_covers_adapters_and_base() -> None:
    publisher = Publisher()
    scaled = replace(publisher.base, changes=(replace(CHANGES[0], scaling=1.6), *CHANGES[1:]))
    other = replace(publisher.base, digest="0" * 32)
    updates = [publisher.update(seed=1), publisher.update(seed=2), *(publisher.update(base=b) for b in (scaled, other))]
    assert len({update.digest for update in updates}) == len(updates)
    assert publisher.update(version=2, seed=1).digest == updates[0].digest


def test_damage_is_detected() -> None:
    publisher = Publisher()
    update = publisher.update(version=3)
    with pytest.raises(WeightSyncError, match="version 3 arrived damaged at the receiver: "):
        received(replace(update, buckets=damaged(update.buckets)))
    base = ReceivedBase()
    broken = replace(update, base=replace(publisher.base, buckets=damaged(publisher.base.buckets)))
    for _ in range(2):  # damaged base weights are not kept
        with pytest.raises(WeightSyncError, match="version 3 arrived damaged at the receiver of the base weights"):
            received(broken, base)
    weights = receive(update, base=base)
    loaded = {name: tensor.clone() for name, tensor in weights}
    loaded["q.weight"][0, 0] += 1
    with pytest.raises(WeightSyncError, match="version 3 arrived damaged at worker 7"):
        weights.confirm(weights.digest_of(loaded.items()), where="worker 7")


def test_bytes_of_an_update_are_those_of_the_adapters() -> None:
    update = Publisher().update()
    sizes = {spec.name: spec.shape for bucket in update.buckets for spec in bucket.tensors}
    assert sizes == {name: tuple(tensor.shape) for name, tensor in random_adapters().items()}
    assert sum(bucket.num_bytes for bucket in update.buckets) == sum(
        RANK * sum(SHAPES[change.weight]) * 4 for change in CHANGES
    )


def test_merge_rounds_once() -> None:
    change = CHANGES[0]
    weight, a, b = torch.randn(32, 16).to(torch.bfloat16), torch.randn(RANK, 16), torch.randn(32, RANK)
    exact = weight.float() + (b @ a) * change.scaling
    assert torch.equal(merge(weight, a, b, change), exact)
    rounded = torch.empty_like(weight)
    assert torch.equal(merge(weight, a, b, change, out=rounded), exact.to(torch.bfloat16))
