"""The Megatron worker on CUDA devices, against the torch worker on the CPU. Runs in a Python that has megatron-core."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "policy"))

pytest.importorskip("megatron.core")

from rank_processes import RankProcesses
from tiny_megatron import megatron_worker, publish, shard_for, state_of, train
from tiny_policy import advantage_loss, make_batch, make_model, make_worker, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "dynamic": {"batching": {"mode": "dynamic", "max_tokens": 30}},
    "packed": {"batching": {"mode": "packed", "max_tokens": 30}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "tp2_sequence": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[RankProcesses]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with RankProcesses(2) as ranks:
        yield ranks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_float32_matches_torch_on_the_cpu(qwen: Path, mode: str, distributed_optimizer: bool) -> None:
    options = {"distributed_optimizer": distributed_optimizer}
    alone = make_worker(qwen)
    with megatron_worker(qwen, "cuda", options=options, **MODES[mode]) as worker:
        shard = shard_for(worker)
        torch.testing.assert_close(worker.get_logprobs(shard), alone.get_logprobs(shard), rtol=1e-2, atol=1e-2)
        for _ in range(3):
            found, expected = worker.train(shard, advantage_loss), alone.train(make_batch(), advantage_loss)
            assert found.metrics == pytest.approx(expected.metrics, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_bfloat16_trains_float32_weights(qwen: Path, activation_checkpointing: bool) -> None:
    config = {"precision": "bfloat16", "activation_checkpointing": activation_checkpointing}
    with megatron_worker(qwen, "cuda", **config) as worker:
        shard = shard_for(worker)
        losses = [worker.train(shard, advantage_loss).metrics["loss"] for _ in range(8)]
        assert losses[-1] < losses[0]
        assert {tensor.dtype for tensor in state_of(worker).values()} == {torch.float32}


def test_a_checkpoint_restores_weights_and_optimizer(qwen: Path, tmp_path: Path) -> None:
    with megatron_worker(qwen, "cuda", precision="bfloat16") as worker:
        worker.train(shard_for(worker), advantage_loss)
        worker.save_checkpoint(tmp_path)
        expected = state_of(worker)
    with megatron_worker(qwen, "cuda", precision="bfloat16") as loaded:
        loaded.load_checkpoint(tmp_path)
        found = state_of(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_published_weights_are_those_of_the_cpu(qwen: Path) -> None:
    expected = make_worker(qwen).publish_weights(7, "float32")
    assert expected is not None
    with megatron_worker(qwen, "cuda") as worker:
        update = worker.publish_weights(7, "float32")
    assert update is not None
    assert update.digest == expected.digest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_train_like_one_cpu(qwen: Path, two_gpus: RankProcesses, layout: str) -> None:
    (results, state), _ = two_gpus.run(train, qwen, {"options": LAYOUTS[layout]}, device_type="cuda")
    alone = make_worker(qwen)
    for found in results:
        expected = alone.train(make_batch(), advantage_loss)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-2, abs=1e-3)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_bit_for_bit(qwen: Path, two_gpus: RankProcesses, layout: str) -> None:
    published, _ = two_gpus.run(publish, qwen, {"options": LAYOUTS[layout]}, device_type="cuda")
    update = make_worker(qwen).publish_weights(7, "float32")
    assert update is not None
    assert published[0] == update.digest
