"""Published weights: layout, digest, zero copy, lifetime."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xxhash

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.digest import digest_tensors
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.weights.sender import ALIGNMENT, publish
from nemo_rl.models.weights.transports import TRANSPORTS


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "q": torch.randn(32, 16, generator=generator),
        "k": torch.randn(16, 16, generator=generator),
        "odd": torch.randn(7, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(5, 3, generator=generator).T,
        "ids": torch.arange(11),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket_bytes", [1, 300, 1 << 20])
def test_round_trip_is_exact_for_any_bucket_size(dtype: str, bucket_bytes: int) -> None:
    tensors = _tensors()
    update = publish(tensors.items(), version=3, dtype=dtype, bucket_bytes=bucket_bytes, transport="local")
    received = dict(receive(update))
    assert list(received) == list(tensors)
    for name, tensor in tensors.items():
        expected = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert received[name].dtype == expected.dtype
        assert torch.equal(received[name], expected)
    assert update.digest == digest_tensors(received.items())
    assert all(spec.offset % ALIGNMENT == 0 for bucket in update.buckets for spec in bucket.tensors)
    if bucket_bytes == 1:
        assert len(update.buckets) == len(tensors)


def test_digest_formula() -> None:
    tensor = torch.tensor([1.0, -2.0])
    content = xxhash.xxh3_128(np.array([1.0, -2.0], np.float32).tobytes()).digest()
    expected = xxhash.xxh3_128(b"w\0float32\0(2,)\0" + content).hexdigest()
    assert digest_tensors([("w", tensor)]) == expected
    assert publish([("w", tensor)], version=0, dtype="float32", transport="local").digest == expected


def test_digest_covers_metadata_but_not_buckets() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    digests = [
        digest_tensors([("a", a), ("b", b)]),
        digest_tensors([("b", a), ("a", b)]),
        digest_tensors([("a", b), ("b", a)]),
        digest_tensors([("a", a.view(torch.int32)), ("b", b)]),
    ]
    assert len(set(digests)) == len(digests)
    one = publish(_tensors().items(), version=0, dtype="float32", transport="local")
    many = publish(_tensors().items(), version=9, dtype="float32", bucket_bytes=64, transport="local")
    assert one.digest == many.digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_do_not_change_digest_or_weights(dtype: str) -> None:
    tensors = {f"w{index}": torch.randn(400, 300 + index) for index in range(40)}
    num_threads = torch.get_num_threads()
    updates = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            updates.append(publish(tensors.items(), version=0, dtype=dtype, bucket_bytes=3_000_000, transport="local"))
            assert digest_tensors(receive(updates[-1])) == updates[-1].digest
    finally:
        torch.set_num_threads(num_threads)
    assert updates[0].digest == updates[1].digest
    for name, tensor in receive(updates[1]):
        assert torch.equal(tensor, tensors[name].to(tensor.dtype))


def test_adjacent_tensors_have_no_gap() -> None:
    received = dict(receive(publish(_tensors().items(), version=0, dtype="float32", transport="local")))
    assert received["q"].data_ptr() + received["q"].numel() * 4 == received["k"].data_ptr()


def test_published_weights_are_a_copy() -> None:
    source = torch.ones(4)
    update = publish([("w", source)], version=0, dtype="float32", transport="local")
    source.zero_()
    assert dict(receive(update))["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize("position", [0, -1])
def test_flipped_bit_is_detected(position: int) -> None:
    update = publish([("w", torch.ones(64))], version=17, dtype="float32", transport="local")
    update.buckets[0].handle[position] ^= 1
    with pytest.raises(WeightSyncError, match="version 17") as failure:
        next(receive(update))
    actual = digest_tensors(receive(update, verify=False))
    assert actual != update.digest
    assert update.digest in str(failure.value)
    assert actual in str(failure.value)


def test_short_bucket_is_refused() -> None:
    update = publish([("w", torch.ones(64))], version=1, dtype="float32", transport="local")
    bucket = dataclasses.replace(update.buckets[0], handle=update.buckets[0].handle[:-4])
    with pytest.raises(WeightSyncError, match="252 bytes instead of 256"):
        next(receive(dataclasses.replace(update, buckets=(bucket,))))


def test_publish_refuses_invalid_arguments() -> None:
    with pytest.raises(WeightSyncError, match="'w' is published twice"):
        publish([("w", torch.ones(1)), ("w", torch.ones(1))], version=0, dtype="float32", transport="local")
    with pytest.raises(WeightSyncError, match="contain no tensors"):
        publish([], version=0, dtype="float32", transport="local")
    with pytest.raises(WeightSyncError, match="'float33'"):
        publish([("w", torch.ones(1))], version=0, dtype="float33", transport="local")
    with pytest.raises(WeightSyncError, match="Did you mean 'local'"):
        publish([("w", torch.ones(1))], version=0, dtype="float32", transport="lokal")


def test_publish_holds_one_bucket_of_a_generator() -> None:
    alive: list[int] = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(8):
            gc.collect()
            alive.append(sum(1 for thing in gc.get_objects() if type(thing) is _Gathered))
            yield f"w{index}", torch.ones(16).as_subclass(_Gathered)

    publish(gathered(), version=0, dtype="float32", bucket_bytes=128, transport="local")
    assert max(alive) <= 5, alive  # two per bucket, their detached copies, and the current one


class _Gathered(torch.Tensor):
    """A tensor type that the test counts."""


def test_registry_has_the_documented_transports() -> None:
    assert set(TRANSPORTS) == {"ray", "shared_memory", "gloo", "cuda_ipc", "nccl", "local"}


def _in_cluster(connection) -> None:
    """Run everything that needs Ray in a separate process, and send back the results."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    import ray

    ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=128 * 1024 * 1024, log_to_driver=False)
    try:
        update = publish(_tensors().items(), version=5, dtype="bfloat16", bucket_bytes=600)

        @ray.remote(num_cpus=1)
        class Receiver:
            def load(self, update):
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    self.views = dict(receive(update))
                again = dict(receive(update))
                self.shared = all(
                    self.views[name].data_ptr() == again[name].data_ptr() for name in again if again[name].numel()
                )
                return digest_tensors(self.views.items()), self.shared

            def digest(self):
                return digest_tensors(self.views.items())

        receiver = Receiver.remote()
        loaded = ray.get(receiver.load.remote(update))
        expected, size = update.digest, len(pickle.dumps(dataclasses.replace(update, buckets=())))
        del update
        gc.collect()
        # Enough to evict every unreferenced object from the store.
        for _ in range(40):
            ray.put(np.zeros(8 * 1024 * 1024, np.uint8))
        connection.send((expected, loaded, ray.get(receiver.digest.remote()), size))
    finally:
        ray.shutdown()


def test_ray_views_are_shared_and_outlive_the_handle() -> None:
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=_in_cluster, args=(child,))
    process.start()
    try:
        assert parent.poll(120), "no answer from the process with Ray"
        expected, (digest, shared), digest_later, size = parent.recv()
    finally:
        process.join(30)
    assert digest == expected
    assert shared
    assert digest_later == expected
    assert size < 1000
