"""Tests that rows divided over threads give the results of one thread, every time the same ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import advantage_loss, make_batch, make_model, make_worker, pairs_batch, weights

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy import row_parts as row_parts_module
from nemo_rl.models.policy.row_parts import row_parts
from nemo_rl.models.row_threads import RowThreads


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_items_run_at_the_same_time_with_one_torch_thread_each() -> None:
    torch.set_num_threads(4)
    threads = RowThreads(3)
    barrier = threading.Barrier(3, timeout=60)

    def run(item: int) -> tuple[int, int, bool]:
        barrier.wait()  # passes only if all three run at the same time
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        assert threads.map(run, [7, 8, 9]) == [(7, 1, False), (8, 1, False), (9, 1, False)]
    assert threads.map(lambda item: (item, torch.is_grad_enabled()), [1, 2]) == [(1, True), (2, True)]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_is_raised_after_all_items_have_ended(bad: int) -> None:
    ended: list[int] = []

    def run(item: int) -> None:
        if item == bad:
            raise ValueError(f"item {item}")
        ended.append(item)

    with pytest.raises(ValueError, match=f"item {bad}"):
        RowThreads(3).map(run, [0, 1, 2])
    assert sorted(ended) == [item for item in range(3) if item != bad]


@settings(deadline=None, max_examples=80)
@given(
    groups=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=6),
    count=st.integers(1, 4),
)
def test_parts_cover_all_rows_and_keep_groups_together(groups: list[tuple[int, int]], count: int) -> None:
    width, rows, mask = 8, [], []
    for number, (length, size) in enumerate(groups, start=1):
        prompt = torch.full((length,), number)
        for sample in range(size):
            rows.append(torch.cat([prompt, torch.full((width - length,), 20 + sample)]))
            mask.append((torch.arange(width) >= length).float())
    batch = BatchedDataDict(
        input_ids=torch.stack(rows), input_lengths=torch.full((len(rows),), width), token_mask=torch.stack(mask)
    )
    parts = row_parts(batch, count)
    assert len(parts) <= count
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(len(rows)))
    assert all(part.stop > part.start for part in parts)
    if len(groups) >= count:
        starts = {sum(size for _, size in groups[:index]) for index in range(len(groups))}
        assert all(part.start in starts for part in parts)


def two_workers(model: Path, **config: Any) -> tuple[Any, Any]:
    divided = make_worker(model, num_threads=2, **config)
    assert divided._forward._threads is not None
    assert torch.get_num_threads() == 1
    return divided, make_worker(model, num_threads=1, **config)


@pytest.mark.parametrize(
    "config",
    [{}, {"train_micro_batch_size": 3}, {"batching": {"mode": "packed"}}, {"lora": {"rank": 2}}],
    ids=["all rows", "micro-batches", "packed", "lora"],
)
def test_two_threads_equal_one(tmp_path: Path, config: dict[str, Any]) -> None:
    divided, single = two_workers(make_model(tmp_path, "qwen2"), **config)
    assert single._forward._threads is None
    results = []
    for worker in (divided, single):
        logprobs = worker.get_logprobs(make_batch())
        trained = [worker.train(make_batch(), advantage_loss).metrics for _ in range(2)]
        results.append((logprobs, trained, dict(worker._model.full_tensors())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_repetitions_are_bit_identical(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama")
    states = []
    for _ in range(2):
        worker, _ = two_workers(model)
        for seed in range(5):
            worker.train(make_batch(seed=seed), advantage_loss)
        states.append(weights(worker))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_reference_policy_uses_the_same_threads(tmp_path: Path) -> None:
    divided, _ = two_workers(make_model(tmp_path, "llama"))
    reference = divided.get_reference_policy_logprobs(make_batch())
    assert divided._reference._threads is divided._forward._threads
    assert torch.equal(reference, divided.get_logprobs(make_batch()))
    assert divided.attestation()["num_threads"] == 2


def test_loss_sees_all_rows_of_a_micro_batch(tmp_path: Path) -> None:
    divided, _ = two_workers(make_model(tmp_path, "llama"))
    sizes: list[tuple[int, ...]] = []

    def loss(logprobs: torch.Tensor, batch: Any, *counts: torch.Tensor) -> Any:
        sizes.append((len(logprobs), batch.size))
        return advantage_loss(logprobs, batch, *counts)

    batch = pairs_batch()
    batch["advantages"] = torch.randn(batch.size)
    divided.train(batch, loss)
    assert sizes == [(batch.size, batch.size)]


def test_large_and_sharded_models_divide_operations_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path, "llama")
    monkeypatch.setattr(row_parts_module, "SMALL_MODEL", 1000)
    worker = make_worker(model, num_threads=2)
    assert worker._forward._threads is None
    assert torch.get_num_threads() == 2
