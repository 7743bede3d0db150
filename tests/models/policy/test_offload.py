"""Offloading of a policy's memory: training is bit-exact with and without it.

On a CPU, memory moves as on a GPU: a storage is copied, then freed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import RankProcesses
from tiny_policy import advantage_loss, assert_equal, make_batch, make_worker, nan_loss, shard_of, weights
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_rl.errors import ModelError, NonFiniteError, TrainingError
from nemo_rl.models.policy import offload
from nemo_rl.models.policy.offload import Part, PolicyMemory, Scratch, StoredTensors
from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker

CPU = torch.device("cpu")
SHARDINGS = ("ddp", "fsdp")


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# --- StoredTensors ---------------------------------------------------------------------------------------------------


def test_views_and_tied_weights_move_once() -> None:
    buffer = torch.arange(12.0)
    first, second = nn.Parameter(buffer[:4].view(2, 2)), nn.Parameter(buffer[4:])
    separate = nn.Parameter(torch.ones(3))
    expected = [tensor.detach().clone() for tensor in (first, second, separate, buffer)]
    moved = StoredTensors(lambda: [first, second, separate, separate], CPU)
    moved.to_host()
    assert [tensor.untyped_storage().nbytes() for tensor in (buffer, first, second, separate)] == [0, 0, 0, 0]
    assert len(moved._places) == 2
    moved.to_device()
    moved.wait()
    assert all(torch.equal(actual, value) for actual, value in zip((first, second, separate, buffer), expected))
    with torch.no_grad():
        first.fill_(7)
    assert torch.equal(buffer[:4], torch.full((4,), 7.0))


def test_storages_are_split_at_host_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_CHUNK_BYTES", 1000)
    tensors = [torch.randn(size) for size in (1, 700, 3, 250, 64)] + [torch.empty(0)]
    expected = [tensor.clone() for tensor in tensors]
    moved = StoredTensors(lambda: tensors, CPU)
    for _ in range(2):
        moved.to_host()
        moved.to_device()
        assert all(torch.equal(actual, value) for actual, value in zip(tensors, expected))
    tensors.append(torch.randn(5000))  # like optimizer state that the first step creates
    expected.append(tensors[-1].clone())
    moved.to_host()
    moved.to_device()
    assert all(torch.equal(actual, value) for actual, value in zip(tensors, expected))


def test_host_memory_is_reused() -> None:
    tensor = torch.randn(1000)
    moved = StoredTensors(lambda: [tensor], CPU)
    addresses = set()
    for step in range(3):
        moved.to_host()
        addresses.add(tuple(chunk.data_ptr() for chunk in moved._host._chunks))
        moved.to_device()
        tensor += step
    assert len(addresses) == 1


def test_constant_tensors_are_copied_once() -> None:
    tensor = torch.zeros(4)
    moved = StoredTensors(lambda: [tensor], CPU, constant=True)
    moved.to_host()
    moved.to_device()
    tensor += 1  # violates `constant`, to show that the second copy is skipped
    moved.to_host()
    moved.to_device()
    assert torch.equal(tensor, torch.zeros(4))


def test_out_of_host_memory_keeps_parts_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # An allocation of 2**62 bytes fails on every machine.
    tensor = torch.ones(3)
    memory = PolicyMemory(CPU)
    moved = StoredTensors(lambda: [tensor], CPU)
    memory.add(Part.WEIGHTS, moved)
    monkeypatch.setattr(offload, "_CHUNK_BYTES", 2**62)
    monkeypatch.setattr(offload, "_ALIGNMENT", 2**62)
    with pytest.raises(TrainingError, match=r"policy\.offload needs .* set policy\.offload=false"):
        memory.offload()
    assert memory.is_loaded(Part.WEIGHTS)
    assert torch.equal(tensor, torch.ones(3))


def test_out_of_device_memory_keeps_parts_on_the_host() -> None:
    class Full:
        def to_host(self) -> None: ...

        def to_device(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def wait(self) -> None: ...

    memory = PolicyMemory(CPU)
    memory.add(Part.OPTIMIZER, Full())
    memory.offload()
    with pytest.raises(TrainingError, match=r"memory \(optimizer state\) does not fit back on cpu"):
        memory.load(Part.OPTIMIZER)
    assert not memory.is_loaded(Part.OPTIMIZER)


# --- PolicyMemory ----------------------------------------------------------------------------------------------------


def test_loaded_part_is_offloaded_again_only_if_memory_is_shared() -> None:
    tensor = torch.ones(3)
    memory = PolicyMemory(CPU)
    memory.add(Part.WEIGHTS, StoredTensors(lambda: [tensor], CPU))
    with memory.loaded(Part.WEIGHTS):
        pass
    assert memory.is_loaded(Part.WEIGHTS)
    memory.offload()
    with memory.loaded(Part.WEIGHTS):
        assert torch.equal(tensor, torch.ones(3))
    assert not memory.is_loaded(Part.WEIGHTS)
    memory.load(Part.WEIGHTS)
    with memory.loaded(Part.WEIGHTS):
        pass
    assert memory.is_loaded(Part.WEIGHTS)


def test_keep_weights() -> None:
    released = []
    memory = PolicyMemory(CPU)
    memory.add(Part.WEIGHTS, Scratch(lambda: released.append("weights")))
    memory.add(Part.OPTIMIZER, Scratch(lambda: released.append("optimizer")))
    memory.offload(keep_weights=True)
    assert released == ["optimizer"]
    memory.offload()
    memory.offload()
    assert released == ["optimizer", "weights"]


# --- the torch worker ------------------------------------------------------------------------------------------------


def make_movable_worker(model: Path, **config: Any) -> TorchPolicyWorker:
    """A worker whose weights can move, as on a GPU. On a CPU they may be mapped from their file."""
    worker = make_worker(model, **config)
    for parameter in worker._model.parameters().values():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.clone()
    return worker


def bytes_on_device(worker: Any) -> int:
    """Sum the bytes of all storages of parameters, gradients and optimizer state."""
    tensors = [*worker._model.parameters().values(), *worker._optimizer.state_tensors()]
    tensors += [parameter.grad for parameter in worker._model.parameters().values() if parameter.grad is not None]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in (tensor.detach() for tensor in tensors)]
    return sum(tensor.untyped_storage().nbytes() for tensor in local)


def train(rank: int, model: Path, num_ranks: int, *, offloads: bool, **config: Any) -> Any:
    """Train five steps with every call of a run in between; returns losses, log-probabilities and state."""
    worker = make_movable_worker(model, **config)
    shard = shard_of(make_batch(), rank, num_ranks, **config)
    actual: list[Any] = []
    for step in range(5):
        if offloads:
            worker.offload(keep_weights=True)
        # Without a cast, the digest reads the weights through numpy, and on a CPU such memory cannot move.
        update = worker.publish_weights(step, "bfloat16")
        actual.append(update and update.digest)
        if offloads:
            worker.offload()
            assert bytes_on_device(worker) == 0
        actual.append(worker.get_logprobs(shard))
        actual.append(worker.get_reference_policy_logprobs(shard))
        actual.append(worker.train(shard, advantage_loss).metrics)
    if offloads:
        worker.offload()
        worker._memory.load(Part.WEIGHTS, Part.OPTIMIZER)
    result = actual, weights(worker)
    worker.shutdown()
    return result


def assert_same(first: Any, second: Any) -> None:
    (actual, state), (expected, expected_state) = first, second
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert_equal(state, expected_state)


CASES: list[dict[str, Any]] = [
    {"sharding": "ddp"},
    {"sharding": "ddp", "precision": "bfloat16", "activation_checkpointing": True},
    {"sharding": "fsdp"},
    {"sharding": "fsdp", "precision": "bfloat16", "batching": {"mode": "packed", "max_tokens": 40}},
]


@pytest.mark.parametrize("config", CASES, ids=str)
def test_offload_is_bit_exact(tied_llama: Path, config: dict[str, Any]) -> None:
    assert_same(train(0, tied_llama, 1, offloads=True, **config), train(0, tied_llama, 1, offloads=False, **config))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_offload_is_bit_exact_on_two_ranks(llama: Path, two_ranks: RankProcesses, sharding: str) -> None:
    offloaded = two_ranks.run(train, llama, 2, offloads=True, sharding=sharding)
    plain = two_ranks.run(train, llama, 2, offloads=False, sharding=sharding)
    for one, other in zip(offloaded, plain):
        assert_same(one, other)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_every_method_works_while_offloaded(llama: Path, tmp_path: Path, sharding: str) -> None:
    worker = make_movable_worker(llama, sharding=sharding)
    batch = make_batch()
    worker.train(batch, advantage_loss)
    expected = weights(worker)
    worker.offload()
    worker.save_checkpoint(tmp_path)
    worker.offload()
    assert worker.attestation()["num_parameters"] > 0
    with pytest.raises(NonFiniteError):
        worker.train(batch, nan_loss)
    worker.offload()
    worker.train(batch, advantage_loss)
    after = weights(worker)
    worker.shutdown()
    other = make_movable_worker(llama, sharding=sharding)
    other.offload()
    other.load_checkpoint(tmp_path)
    assert_equal(weights(other), expected)
    other.offload()
    other.train(batch, advantage_loss)
    assert_equal(weights(other), after)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_offloaded_model_refuses_to_run(llama: Path, sharding: str) -> None:
    worker = make_movable_worker(llama, sharding=sharding)
    worker.get_reference_policy_logprobs(make_batch())
    worker.offload()
    ids = make_batch()["input_ids"]
    for module, name in ((worker._model.module, "weights"), (worker._reference._model.module, "reference")):
        with pytest.raises(ModelError, match=rf"{name}.* are in the host's memory"):
            module(input_ids=ids)


def test_offload_drops_gradients_of_a_failed_loss(llama: Path) -> None:
    worker = make_movable_worker(llama, train_micro_batch_size=4)

    seen: list[int] = []

    def fails_late(
        logprobs: torch.Tensor, batch: Any, *counts: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen.append(0)
        if len(seen) == 2:
            raise RuntimeError("of the loss")
        return advantage_loss(logprobs, batch, *counts)

    with pytest.raises(RuntimeError, match="of the loss"):
        worker.train(make_batch(), fails_late)
    assert bytes_on_device(worker) > 0
    worker.offload()
    assert bytes_on_device(worker) == 0


def test_optimizer_returns_during_the_backward_pass(llama: Path) -> None:
    worker = make_movable_worker(llama)
    worker.train(make_batch(), advantage_loss)
    worker.offload()
    here: list[bool] = []

    def observe(*args: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        here.append(worker._memory.is_loaded(Part.OPTIMIZER))
        return advantage_loss(*args)

    worker.train(make_batch(), observe)
    assert here == [True]


def test_nothing_moves_without_offload(llama: Path) -> None:
    worker = make_movable_worker(llama)
    addresses: Callable[[], list[int]] = lambda: [p.data_ptr() for p in worker._model.parameters().values()]  # noqa: E731
    before = addresses()
    worker.publish_weights(1, "float32")
    worker.get_reference_policy_logprobs(make_batch())
    gc.collect()
    assert addresses() == before
    assert worker._memory.is_loaded(Part.REFERENCE)
