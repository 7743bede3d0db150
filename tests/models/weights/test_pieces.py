"""Streams whose buckets are read while they are filled: exactness, the ring, and failures of either side."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights import pieces
from nemo_rl.models.weights.digest import digest_tensors
from nemo_rl.models.weights.incoming import IncomingWeights
from nemo_rl.models.weights.interfaces import TensorSpec, WeightStream
from nemo_rl.models.weights.pieces import NUM_SLOTS, PIECE_BYTES, RING_BYTES, PiecewiseBucket
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.weights.shared_memory import SharedMemoryTransport
from nemo_rl.models.weights.stream import WeightStreamer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets and memfd need Linux")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread per side, as on two cores: with more, streams are not piecewise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(seed: int) -> Tensors:
    """Return tensors that are larger than the ring, smaller than a piece, end at the end of one, or are empty."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [RING_BYTES + 12_345 * 4, 4, PIECE_BYTES - 64, PIECE_BYTES, 100, 0, 3 * PIECE_BYTES + 20, 64, 28]
    return {f"layers.{i}.weight": torch.rand(size // 4, generator=generator) for i, size in enumerate(sizes)}


class Sender:
    """Sends in a thread, as a policy worker sends in its process."""

    def __init__(self) -> None:
        self.streamer = WeightStreamer()
        self.num_streams = 0

    def begin(
        self, tensors: Iterable[tuple[str, torch.Tensor]], num_receivers: int = 1, dtype: str = "float32"
    ) -> tuple[list[WeightStream], Future[str]]:
        address, key = self.streamer.endpoint()
        self.num_streams += 1
        stream = WeightStream(self.num_streams, "shared_memory", address, key, self.num_streams, 0)
        sent: Future[str] = Future()

        def send() -> None:
            try:
                receivers = range(num_receivers)
                how = {"version": stream.version, "dtype": dtype, "stream": stream.stream, "receivers": receivers}
                sent.set_result(self.streamer.send(tensors, **how))
            except BaseException as error:
                sent.set_exception(error)

        threading.Thread(target=send, daemon=True).start()
        return [replace(stream, receiver=receiver) for receiver in range(num_receivers)], sent

    @property
    def segment_sizes(self) -> list[int]:
        transport = self.streamer._transport
        assert isinstance(transport, SharedMemoryTransport)
        return [segment.num_bytes for segment in transport._segments]


@pytest.fixture
def sender() -> Sender:
    return Sender()


def load(stream: WeightStream, own: Tensors | None) -> tuple[Tensors, IncomingWeights]:
    """Receive a stream into `own`, or keep the memory that arrives if that is None."""
    weights = receive(stream, verify=False, keeps=own is None, into=own)
    received = dict(weights)
    assert weights.digest_of(received.items()) == weights.digest == digest_tensors(received.items())
    return received, weights


def child(pipe: Connection) -> None:
    """Run in another process: receive streams until killed."""
    torch.set_num_threads(1)
    for stream, what in iter(pipe.recv, None):
        if what == "hang":
            arriving = receive(stream, verify=False, into={})
            next(arriving)
            pipe.send("joined")
            threading.Event().wait(600)
        pipe.send(load(stream, None if what == "keep" else {})[1].digest)


@pytest.fixture
def other() -> Iterator[tuple[Connection, Any]]:
    # One server imports torch, and each process is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nemo_rl.models.weights.receiver"])
    here, there = context.Pipe()
    process = context.Process(target=child, args=(there,), daemon=True)
    process.start()
    yield here, process
    process.kill()
    process.join()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_arrive_in_the_memory_of_the_receiver(sender: Sender, dtype: str) -> None:
    own: Tensors = {}
    addresses = []
    for seed in range(3):
        (stream,), sent = sender.begin(model(seed).items(), dtype=dtype)
        received, weights = load(stream, own)
        assert sent.result(60) == weights.digest
        expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model(seed).items()}
        assert list(received) == list(expected)
        assert all(torch.equal(received[name], expected[name]) for name in expected)
        own = received
        addresses.append([tensor.data_ptr() for tensor in received.values()])
    assert addresses[0] == addresses[1] == addresses[2]
    assert sender.segment_sizes == [RING_BYTES]  # for any size of the model


def test_memory_that_does_not_fit_is_left_alone(sender: Sender) -> None:
    expected = model(0)
    names = list(expected)
    size = expected[names[0]].numel()
    unfit = {
        names[0]: torch.zeros(size + 1),
        names[1]: torch.zeros(1, dtype=torch.float64),
        names[2]: torch.zeros(expected[names[2]].numel(), 2)[:, 0],
    }
    (stream,), sent = sender.begin(expected.items())
    received, _ = load(stream, unfit)
    assert all(torch.equal(received[name], expected[name]) for name in names)
    assert not any(tensor.any() for tensor in unfit.values())
    sent.result(60)


def test_sources_need_not_be_contiguous(sender: Sender) -> None:
    expected = {"a.weight": torch.rand(700, 900).T, "b.weight": torch.rand(5, 5)[:, ::2]}
    for dtype in ("float32", "bfloat16"):
        (stream,), sent = sender.begin(expected.items(), dtype=dtype)
        received, weights = load(stream, {})
        assert all(torch.equal(received[name], expected[name].to(getattr(torch, dtype))) for name in expected)
        assert sent.result(60) == weights.digest


def test_kept_memory_is_never_overwritten(sender: Sender) -> None:
    kept = []
    for seed in range(3):
        (stream,), sent = sender.begin(model(seed).items())
        kept.append(load(stream, None)[0])
        sent.result(60)
    for seed, received in enumerate(kept):
        assert all(torch.equal(received[name], tensor) for name, tensor in model(seed).items())


@pytest.mark.parametrize(
    "kinds", [("keep", "own"), ("own", "own"), ("keep", "keep"), ("own", "plain"), ("keep", "plain")]
)
def test_receivers_of_one_stream_may_differ(
    sender: Sender, other: tuple[Connection, Any], kinds: tuple[str, str]
) -> None:
    """A receiver that cannot read pieces, and others that can, get the same weights."""
    pipe, _ = other
    for seed in range(2):
        (mine, theirs), sent = sender.begin(model(seed).items(), num_receivers=2)
        pipe.send((theirs, kinds[0]))
        if kinds[1] == "plain":
            digest = digest_tensors({name: tensor.clone() for name, tensor in receive(mine)}.items())
        else:
            digest = load(mine, None if kinds[1] == "keep" else {})[1].digest
        assert digest == sent.result(60) == pipe.recv() == digest_tensors(model(seed).items())


def test_killed_receiver_does_not_block_the_sender(sender: Sender, other: tuple[Connection, Any]) -> None:
    pipe, process = other
    (mine, theirs), sent = sender.begin(model(0).items(), num_receivers=2)
    pipe.send((theirs, "hang"))
    with ThreadPoolExecutor(1) as threads:
        loaded = threads.submit(load, mine, {})
        assert pipe.recv() == "joined"
        assert not sent.done()  # the other receiver does not read, and the ring is full
        process.kill()
        assert loaded.result(60)[1].digest == sent.result(60)


def test_closed_receiver_does_not_block_the_sender(sender: Sender) -> None:
    (stream,), sent = sender.begin(model(0).items())
    weights = receive(stream, verify=False, into={})
    next(weights)
    weights.close()
    assert sent.result(60) == digest_tensors(model(0).items())
    with pytest.raises(WeightSyncError, match="not all weights of version 1"):
        _ = weights.digest


@pytest.mark.parametrize("keeps", [True, False])
def test_sender_error_reaches_receivers(sender: Sender, monkeypatch: pytest.MonkeyPatch, keeps: bool) -> None:
    """It ends in the middle of a bucket."""
    write = pieces.PieceWriter.write

    def failing(self: pieces.PieceWriter, spec: TensorSpec, source: torch.Tensor) -> bytes:
        if spec.name == "layers.6.weight":
            raise RuntimeError("a rank died")
        return write(self, spec, source)

    monkeypatch.setattr(pieces.PieceWriter, "write", failing)
    (stream,), sent = sender.begin(model(0).items())
    with pytest.raises(WeightSyncError, match="version 1 has ended or stopped"):
        load(stream, None if keeps else {})
    with pytest.raises(RuntimeError, match="a rank died"):
        sent.result(60)
    monkeypatch.undo()
    torch.set_num_threads(1)
    (stream,), sent = sender.begin(model(1).items())  # the next stream works
    assert load(stream, None if keeps else {})[1].digest == sent.result(60)


@pytest.mark.parametrize("keeps", [True, False])
def test_damage_on_the_way_is_detected(sender: Sender, monkeypatch: pytest.MonkeyPatch, keeps: bool) -> None:
    received = pieces._received

    def damaging(socket: int, most: int) -> int:
        num_pieces = received(socket, most)
        if threading.current_thread() is not threading.main_thread():
            return num_pieces
        for segment in sender.streamer._transport._segments:  # type: ignore[attr-defined]
            np.frombuffer(segment.mapping, np.uint8)[:100] ^= 1
        return num_pieces

    monkeypatch.setattr(pieces, "_received", damaging)
    (stream,), sent = sender.begin([("a.weight", torch.rand(1000))])
    weights = receive(stream, keeps=keeps, into=None if keeps else {})
    with pytest.raises(WeightSyncError, match="version 1 arrived damaged at the receiver: expected digest"):
        list(weights)
    sent.result(60)


def test_damage_in_the_memory_of_the_receiver_is_detected(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    copyto = np.copyto

    def damaging(target: Any, source: Any) -> None:
        copyto(target, source)
        if threading.current_thread() is threading.main_thread():
            target[7] ^= 1

    monkeypatch.setattr(pieces.np, "copyto", damaging)
    (stream,), sent = sender.begin([("a.weight", torch.rand(1000))])
    with pytest.raises(WeightSyncError, match="version 1 arrived damaged"):
        list(receive(stream, into={}))
    sent.result(60)


def test_memory_that_was_replaced_is_read_again(sender: Sender) -> None:
    """The digest computed on arrival is not used for other memory."""
    (stream,), sent = sender.begin(model(0).items())
    weights = receive(stream, verify=False, into={})
    received = dict(weights)
    received["layers.0.weight"] = torch.zeros_like(received["layers.0.weight"])
    assert weights.digest_of(received.items()) != weights.digest == sent.result(60)


def test_parts_cover_each_tensor_once() -> None:
    sizes = [RING_BYTES + 100, 4, PIECE_BYTES - 64, 0, 3 * PIECE_BYTES]
    for in_ring in (False, True):
        offset, specs = 0, []
        for index, size in enumerate(sizes):
            specs.append(TensorSpec(str(index), "uint8", (size,), offset))
            offset += size + 64
        bucket = PiecewiseBucket(tuple(specs), offset, None, in_ring)
        for spec, size in zip(specs, sizes, strict=True):
            covered = 0
            for piece, place, slot, end in bucket.parts(spec):
                assert place.start == covered
                covered = place.stop
                assert slot.stop - slot.start == place.stop - place.start
                assert 0 <= slot.start < slot.stop <= bucket.memory_bytes
                assert end == spec.offset + covered
                assert piece == (end - 1) // PIECE_BYTES < bucket.num_pieces
                assert slot.start // PIECE_BYTES == (piece % NUM_SLOTS if in_ring else piece)
            assert covered == size


def test_end_of_the_other_side_is_noticed() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"fff")
    os.close(writing)
    assert pieces._received(reading, 2) == 2
    assert pieces._received(reading, 2) == 1
    with pytest.raises(EOFError):
        pieces._received(reading, 2)
    os.close(reading)
