"""Streams of weights between GPU processes: CUDA IPC on one GPU, NCCL between two."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

import pytest
import torch

from nemo_rl.models.weights.digest import digest_tensors, row_sums
from nemo_rl.models.weights.interfaces import WeightStream
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.weights.stream import WeightStreamer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MIB = 1 << 20
SHAPE, NUM_TENSORS = (1024, 1024), 40  # 2 MiB each in bfloat16
BUCKET_BYTES = 8 * MIB


def tensors(value: float, device: str = "cuda") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors as a policy gathers them: each is freed after it has been copied."""
    for index in range(NUM_TENSORS):
        yield f"layers.{index}.up.weight", torch.full(SHAPE, value + index / 8, device=device)


def child(connection: Connection, device_index: int) -> None:
    """Run a receiver on a GPU in another process: load each stream in place or into new memory."""
    torch.cuda.set_device(device_index)
    loaded: dict[str, torch.Tensor] = {}
    for stream, what in iter(connection.recv, None):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weights = receive(stream, device="cuda", verify=what == "verify", keeps=what == "keep")
        for name, tensor in weights:
            if what == "hang":
                connection.send("joined")
                connection.recv()
            if what == "keep" or name not in loaded:
                loaded[name] = tensor if what == "keep" else tensor.clone()
            else:
                loaded[name].copy_(tensor)
        digest = weights.digest_of(loaded.items())
        grown = torch.cuda.max_memory_allocated() - before
        connection.send((digest, weights.digest, float(loaded["layers.39.up.weight"][0, 0]), grown))


@dataclass
class Peer:
    """The other process."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    transport: str
    streamer: WeightStreamer
    num_streams: int = 0

    def load(self, value: float, what: str = "copy") -> tuple[str, str, float, int]:
        with ThreadPoolExecutor(1) as threads:
            self.num_streams += 1
            address, key = self.streamer.endpoint()
            number = self.num_streams
            self.pipe.send((WeightStream(number, self.transport, address, key, number, 0), what))
            sent = threads.submit(
                self.streamer.send, tensors(value), version=number, dtype="bfloat16", stream=number, receivers=[0]
            )
            if what == "hang":
                assert self.pipe.recv() == "joined"
                self.process.kill()
                return sent.result(120), "", 0.0, 0
            assert self.pipe.poll(120), "no answer from the other process"
            actual, announced, last, grown = self.pipe.recv()
            assert announced == sent.result(120)
            return actual, announced, last, grown


@pytest.fixture(params=["cuda_ipc", "nccl"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    on_two = request.param == "nccl"
    if on_two and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(there, int(on_two)), daemon=True)
    process.start()
    yield Peer(process, here, request.param, WeightStreamer(request.param, BUCKET_BYTES))
    process.kill()
    process.join()


@pytest.mark.parametrize("what", ["copy", "keep", "verify"])
def test_repeated_streams_are_exact(peer: Peer, what: str) -> None:
    for value in (1.0, 2.0, 3.0):
        actual, announced, last, _ = peer.load(value, what)
        named = [(name, tensor.bfloat16()) for name, tensor in tensors(value)]
        assert actual == announced == digest_tensors(named, on_gpu=True)
        assert last == float(torch.tensor(value + 39 / 8).bfloat16())


def test_extra_memory_is_a_few_buckets_on_both_sides(peer: Peer) -> None:
    peer.load(0.0)  # allocates the receiver's weights and loads both sides' libraries
    torch.cuda.ipc_collect()  # memory that the receiver released after the sender had ended
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    *_, grown = peer.load(1.0)
    assert torch.cuda.max_memory_allocated() - before < 5 * 16 * MIB < NUM_TENSORS * 2 * MIB + 16 * MIB
    assert grown < 5 * 16 * MIB
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated() - before < MIB  # no memory is kept between two streams


def test_stream_works_with_expandable_segments(peer: Peer) -> None:
    if not hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        pytest.skip(f"torch {torch.__version__} cannot report its allocator settings")
    before = torch._C._accelerator_getAllocatorSettings()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    try:
        torch.cuda.empty_cache()
        actual, announced, *_ = peer.load(1.0)
    finally:
        torch._C._accelerator_setAllocatorSettings(before)
    assert actual == announced


def test_killed_receiver_does_not_block_the_sender(peer: Peer) -> None:
    digest, *_ = peer.load(1.0, "hang")
    assert digest == digest_tensors([(name, tensor.bfloat16()) for name, tensor in tensors(1.0)], on_gpu=True)


@pytest.mark.parametrize("num_bytes", [1, 6, 1 << 14, (1 << 25) + 5])
def test_row_sums_match_the_cpu(num_bytes: int) -> None:
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    assert torch.equal(row_sums(data.cuda()).cpu(), row_sums(data))
