"""Leases on shared memory: how long memory stays readable, and when it is reused."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.digest import digest_tensors
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.weights.sender import WeightSender

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd needs Linux")


def _tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"w{index}": torch.full((300, 7), float(value + index)) for index in range(5)}


def _publish(sender: WeightSender, version: int) -> Any:
    return sender.publish(_tensors(version).items(), version=version, dtype="float32")


def _addresses(update: Any) -> set[str]:
    return {bucket.handle._origin[2] for bucket in update.buckets}


def _reader(connection: Connection) -> None:
    """Run in another process: answer with the digest of the weights, and keep the views until "drop"."""
    views: dict[str, torch.Tensor] = {}
    for message in iter(connection.recv, None):
        if message == "drop":
            views.clear()
            gc.collect()
        elif message != "look":
            views = dict(receive(pickle.loads(message)))
        connection.send(digest_tensors(views.items()) if views else None)


class _Process:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_reader, args=(other,), daemon=True)
        self.process.start()

    def ask(self, message: Any) -> Any:
        self.pipe.send(message)
        assert self.pipe.poll(60), "no answer from the reading process"
        return self.pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join(30)


@pytest.fixture
def reader():
    process = _Process()
    yield process
    process.end()


def test_other_process_reads_and_memory_is_reused(reader: _Process) -> None:
    sender = WeightSender("shared_memory", bucket_bytes=20_000)
    first = _publish(sender, 1)
    assert len(first.buckets) == 3
    assert reader.ask(pickle.dumps(first)) == first.digest
    second = _publish(sender, 2)
    assert not _addresses(first) & _addresses(second)
    # The reader still holds views of the first update.
    used = _addresses(first)
    digest = first.digest
    del first
    third = _publish(sender, 3)
    assert not used & _addresses(third)
    assert reader.ask("look") == digest
    assert reader.ask(pickle.dumps(third)) == third.digest
    del second
    fourth = _publish(sender, 4)
    assert _addresses(fourth) & used
    assert reader.ask("look") == third.digest
    assert reader.ask("drop") is None


def test_views_share_memory_and_keep_it_alive() -> None:
    sender = WeightSender("shared_memory")
    update = _publish(sender, 1)
    used = _addresses(update)
    views, again = dict(receive(update)), dict(receive(update))
    assert all(views[name].data_ptr() == again[name].data_ptr() for name in views)
    view = views["w3"][10:]
    del update, views, again
    gc.collect()
    assert not used & _addresses(_publish(sender, 2))
    assert view.unique().tolist() == [4.0]
    del view
    gc.collect()
    assert used & _addresses(_publish(sender, 3))


def test_killed_reader_releases_its_memory(reader: _Process) -> None:
    sender = WeightSender("shared_memory")
    update = _publish(sender, 1)
    used = _addresses(update)
    assert reader.ask(pickle.dumps(update)) == update.digest
    del update
    assert not used & _addresses(_publish(sender, 2))
    os.kill(reader.process.pid, signal.SIGKILL)
    reader.process.join(30)
    assert used & _addresses(_publish(sender, 3))


def _publishes(connection: Connection) -> None:
    sender = WeightSender("shared_memory")
    connection.send(pickle.dumps(_publish(sender, 7)))
    connection.recv()


def test_memory_outlives_sender_for_lease_holders_only() -> None:
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_publishes, args=(other,), daemon=True)
    process.start()
    assert pipe.poll(60)
    pickled = pipe.recv()
    update = pickle.loads(pickled)
    process.kill()
    process.join(30)
    assert digest_tensors(receive(update)) == update.digest
    late = pickle.loads(pickled)
    with pytest.raises(WeightSyncError, match=f"process {process.pid}, which holds them, has ended"):
        next(receive(late))


def test_foreign_file_descriptor_is_refused() -> None:
    sender = WeightSender("shared_memory")
    update = _publish(sender, 1)
    lease = update.buckets[0].handle
    pid, fd, _, num_bytes = lease._origin
    with pytest.raises(WeightSyncError, match="cannot be read"):
        type(lease)(pid, fd, "nemo_rl_weights_0000", num_bytes).array()
