"""Streams of weights between processes: exactness, failures of either side, and memory."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection

import pytest
import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights import pairs
from nemo_rl.models.weights.buffers import ReusedBuffers
from nemo_rl.models.weights.cuda_ipc import CudaIpcTransport
from nemo_rl.models.weights.digest import digest_tensors
from nemo_rl.models.weights.interfaces import WeightStream
from nemo_rl.models.weights.pairs import GlooTransport
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.weights.shared_memory import SharedMemoryTransport
from nemo_rl.models.weights.stream import WeightStreamer, connect
from nemo_rl.models.weights.transports import TRANSPORTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets and memfd need Linux")

NUM_TENSORS = 24
BUCKET_BYTES = 2 * 4 * 64 * 32  # two tensors each: twelve buckets


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"layers.{index}.up.weight": torch.full((64, 32), value + index) for index in range(NUM_TENSORS)}


@dataclass
class Sender:
    """Sends in a thread, as a policy worker sends in its process."""

    streamer: WeightStreamer
    threads: ThreadPoolExecutor
    transport: str = "shared_memory"
    host: str | None = None
    num_streams: int = 0

    def begin(self, num_receivers: int, value: float = 0.0, **how: object) -> tuple[list[WeightStream], Future[str]]:
        address, key = self.streamer.endpoint(self.host)
        self.num_streams += 1
        stream = WeightStream(self.num_streams, self.transport, address, key, self.num_streams, 0)
        sent = self.threads.submit(
            self.streamer.send,
            how.get("tensors", tensors(value).items()),  # type: ignore[arg-type]
            version=stream.version,
            dtype=str(how.get("dtype", "float32")),
            stream=stream.stream,
            receivers=range(num_receivers),
        )
        return [replace(stream, receiver=receiver) for receiver in range(num_receivers)], sent

    def digest_of(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        return digest_tensors(named_tensors, on_gpu=TRANSPORTS[self.transport]().on_gpu)

    @property
    def num_segments(self) -> int:
        transport = self.streamer._transport
        assert isinstance(transport, SharedMemoryTransport)
        return len(transport._segments)


def shared_by_torch() -> CudaIpcTransport:
    """Share CPU tensors by the transport for CUDA tensors: torch passes both between processes in the same way."""
    return CudaIpcTransport("cpu")


class PairsAsOnGpus(GlooTransport):
    """Digests on the device like `NcclTransport`, but transfers with gloo."""

    on_gpu = True


STAND_INS = {"torch_ipc": shared_by_torch, "pairs_as_on_gpus": PairsAsOnGpus}


@pytest.fixture
def sender() -> Iterator[Sender]:
    with ThreadPoolExecutor(1) as threads:
        yield Sender(WeightStreamer(bucket_bytes=BUCKET_BYTES), threads)


@pytest.fixture(params=["shared_memory", "gloo", *STAND_INS])
def any_sender(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    """A sender for every streaming transport, or its nearest equivalent on CPUs; pairs connect by TCP."""
    for name, make in STAND_INS.items():
        monkeypatch.setitem(TRANSPORTS, name, make)
    with ThreadPoolExecutor(1) as threads:
        host = "127.0.0.1" if isinstance(TRANSPORTS[request.param](), GlooTransport) else None
        yield Sender(WeightStreamer(request.param, BUCKET_BYTES), threads, request.param, host)


def load(stream: WeightStream, **how: bool) -> tuple[dict[str, torch.Tensor], str]:
    """Receive a stream, copied or kept; returns the tensors and their digest."""
    weights = receive(stream, **how)
    received = {name: tensor if how.get("keeps") else tensor.clone() for name, tensor in weights}
    digest = weights.digest_of(received.items())
    assert weights.digest == digest
    return received, digest


def child(connection: Connection) -> None:
    """Run in another process: receive streams until killed."""
    TRANSPORTS.update(STAND_INS)
    for stream, what in iter(connection.recv, None):
        if what == "join and hang":
            arriving = receive(stream)
            next(arriving)
            connection.send("joined")
            time.sleep(600)
        connection.send(load(stream, keeps=what == "keep")[1])


@dataclass
class Child:
    process: multiprocessing.process.BaseProcess
    pipe: Connection

    def answer(self) -> object:
        assert self.pipe.poll(60), "no answer from the other process"
        return self.pipe.recv()


@pytest.fixture
def other() -> Iterator[Child]:
    # One server imports torch, and each process is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nemo_rl.models.weights.receiver"])
    here, there = context.Pipe()
    process = context.Process(target=child, args=(there,), daemon=True)
    process.start()
    yield Child(process, here)
    process.kill()
    process.join()


@pytest.mark.parametrize("what", ["copy", "keep"])
def test_streamed_weights_are_exact_in_two_processes(any_sender: Sender, other: Child, what: str) -> None:
    for value in (0.0, 100.0):
        (mine, theirs), sent = any_sender.begin(2, value)
        other.pipe.send((theirs, what))
        received, digest = load(mine)
        expected = tensors(value)
        assert list(received) == list(expected)
        assert all(torch.equal(received[name], expected[name]) for name in expected)
        assert digest == other.answer() == sent.result(60) == any_sender.digest_of(expected.items())


def test_stream_casts_dtype(any_sender: Sender) -> None:
    (stream,), sent = any_sender.begin(1, 0.3, dtype="bfloat16")
    received, digest = load(stream)
    assert received["layers.0.up.weight"].dtype == torch.bfloat16
    assert digest == sent.result(60)


def test_stream_reuses_a_few_buckets(sender: Sender) -> None:
    for value in range(3):
        (stream,), sent = sender.begin(1, value)
        load(stream)
        sent.result(60)
    assert sender.num_segments <= 4 < NUM_TENSORS // 2  # in flight, being filled, and still being read


def test_sender_gathers_ahead_within_the_window(any_sender: Sender) -> None:
    """The sender gathers tensors while the receiver loads earlier ones, but only as far as the window allows."""
    gathered = 0

    def gathering() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal gathered
        for name, tensor in tensors(0.0).items():
            gathered += 1
            yield name, tensor

    (stream,), sent = any_sender.begin(1, tensors=gathering())
    arriving = receive(stream)
    ahead = []
    for number, _ in enumerate(arriving, start=1):
        deadline = time.monotonic() + 600
        while gathered < min(number + 4, NUM_TENSORS) and time.monotonic() < deadline:
            time.sleep(0.001)
        ahead.append(gathered - number)
    assert max(ahead[:-4]) >= 4
    assert max(ahead) <= 10
    sent.result(60)


def test_kept_memory_is_never_overwritten(any_sender: Sender) -> None:
    (stream,), sent = any_sender.begin(1, 1.0)
    received, digest = load(stream, keeps=True)
    sent.result(60)
    (again,), sent = any_sender.begin(1, 50.0)
    load(again, keeps=True)
    sent.result(60)
    assert any_sender.digest_of(received.items()) == digest  # the second stream has not overwritten it
    weights = receive(again)
    assert weights.digest_of(received.items()) == digest  # not the memory that arrived, so it is read


def test_kept_modules_stay_contiguous() -> None:
    names = [f"layers.{layer}.attention.{part}.weight" for layer in range(8) for part in "qkv"]
    streamer = WeightStreamer(bucket_bytes=64)
    with ThreadPoolExecutor(1) as threads:
        sender = Sender(streamer, threads)
        (stream,), sent = sender.begin(1, tensors=[(name, torch.ones(16, 4)) for name in names])
        received, _ = load(stream, keeps=True)
        sent.result(60)
    for layer in range(8):
        q, k, v = (received[f"layers.{layer}.attention.{part}.weight"].data_ptr() for part in "qkv")
        assert (k - q, v - k) == (256, 256)


def test_killed_receiver_does_not_block_the_sender(any_sender: Sender, other: Child) -> None:
    (mine, theirs), sent = any_sender.begin(2)
    other.pipe.send((theirs, "join and hang"))
    done: Future[str] = Future()
    threading.Thread(target=lambda: done.set_result(load(mine)[1])).start()
    assert other.answer() == "joined"
    assert not sent.done()
    other.process.kill()
    assert done.result(60) == sent.result(60)


def test_reported_receiver_does_not_block_the_sender(any_sender: Sender) -> None:
    (mine, theirs), sent = any_sender.begin(2)
    done: Future[str] = Future()
    threading.Thread(target=lambda: done.set_result(load(mine)[1])).start()
    connect(theirs, leaves=True).close()
    assert done.result(60) == sent.result(60)


def test_sender_error_reaches_receivers(any_sender: Sender) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tensors(0.0).items())[:5]
        raise RuntimeError("a rank died")

    (stream,), sent = any_sender.begin(1, tensors=failing())
    with pytest.raises(WeightSyncError, match="version 1 has ended or stopped"):
        load(stream)
    with pytest.raises(RuntimeError, match="a rank died"):
        sent.result(60)
    (stream,), sent = any_sender.begin(1)  # the next stream works
    assert load(stream)[1] == sent.result(60)


def test_wrong_key_and_wrong_stream_are_rejected(any_sender: Sender) -> None:
    (stream,), sent = any_sender.begin(1)
    with pytest.raises(WeightSyncError, match="ended or stopped"):
        list(receive(replace(stream, key=b"guessed")))
    with pytest.raises(WeightSyncError, match="ended or stopped"):
        list(receive(replace(stream, stream=stream.stream + 1)))
    Client(stream.address).close()
    silent = [Client(stream.address) for _ in range(100)]  # must not delay the stream
    assert load(stream)[1] == sent.result(60)
    for connection in silent:
        connection.close()
    assert repr(stream.key) not in repr(stream)


def test_closed_receiver_does_not_block_the_sender(any_sender: Sender) -> None:
    (stream,), sent = any_sender.begin(1)
    weights = receive(stream)
    next(weights)
    assert not sent.done()
    weights.close()
    assert sent.result(60) == any_sender.digest_of(tensors(0.0).items())


def test_partially_read_stream_has_no_digest(any_sender: Sender) -> None:
    (stream,), sent = any_sender.begin(1)
    weights = receive(stream)
    next(weights)
    with pytest.raises(WeightSyncError, match="not all weights of version 1"):
        _ = weights.digest
    for _ in weights:
        pass
    assert weights.digest == sent.result(60)


def test_damaged_bucket_is_detected(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    put = SharedMemoryTransport.put

    def damaged(self: SharedMemoryTransport, buffer: torch.Tensor) -> object:
        buffer[5] ^= 1
        return put(self, buffer)

    monkeypatch.setattr(SharedMemoryTransport, "put", damaged)
    (stream,), sent = sender.begin(1)
    with pytest.raises(WeightSyncError, match="version 1 arrived damaged at the receiver: expected digest"):
        list(receive(stream))
    sent.result(60)


def test_pair_is_reused_and_replaced_after_failure(other: Child) -> None:
    known = set(pairs._pairs)
    with ThreadPoolExecutor(1) as threads:
        sender = Sender(WeightStreamer("gloo", BUCKET_BYTES), threads, "gloo", "127.0.0.1")
        actual = []
        for _ in range(2):
            (stream,), sent = sender.begin(1)
            other.pipe.send((stream, "copy"))
            assert other.answer() == sent.result(60)
            actual.append([(peer, group) for peer, group in pairs._pairs.items() if peer not in known])
        assert len(actual[0]) == 1
        assert actual[0] == actual[1]
        pairs_at_the_end = []

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            yield from tensors(0.0).items()
            pairs_at_the_end.append(set(pairs._pairs))

        (stream,), sent = sender.begin(1, tensors=gathered())
        other.pipe.send((stream, "join and hang"))
        assert other.answer() == "joined"
        other.process.kill()
        sent.result(60)
        # The pair is dropped before the stream ends: on a GPU a pending message to a dead receiver blocks later ones.
        assert pairs_at_the_end == [known]


def test_publish_only_transport_is_refused() -> None:
    with pytest.raises(WeightSyncError, match="the transport 'ray' can only publish weights, not stream them"):
        WeightStreamer("ray")


def test_buffers_are_reused_when_unreferenced() -> None:
    buffers = ReusedBuffers()
    first, second = buffers.lend(100), buffers.lend(100)
    addresses = {first.data_ptr(), second.data_ptr()}
    assert len(addresses) == 2
    view = first[:10]
    del first
    again = buffers.lend(200)
    assert again.shape == (200,)
    assert again.data_ptr() == view.data_ptr()
    del again, second
    large = buffers.lend(64 << 20)  # replaces one that is too small
    assert {large.data_ptr()}.isdisjoint(addresses)
    kept = buffers.lend(100)
    assert kept.data_ptr() in addresses
    del buffers, large  # the pool is deleted before `kept`
    kept.fill_(1)
