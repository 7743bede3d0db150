"""The policy worker on CUDA devices, compared with the same worker on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import advantage_loss, assert_equal, make_batch, make_llama, make_worker, nan_loss, weights

from nemo_rl.errors import NonFiniteError
from nemo_rl.models.policy.config import BatchingConfig
from nemo_rl.models.policy.microbatching import sharding_args

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHARDINGS = ("ddp", "fsdp")
MODES: dict[str, dict[str, Any]] = {
    "fixed": {"train_micro_batch_size": 3},
    "dynamic": {"batching": {"mode": "dynamic", "max_tokens": 30}},
    "packed": {"batching": {"mode": "packed", "max_tokens": 30}},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_float32_matches_the_cpu(llama: Path, sharding: str, mode: str) -> None:
    config, batch = MODES[mode], make_batch()
    result = batch.shard_by_batch_size(1, **sharding_args(BatchingConfig(**config.get("batching", {}))))
    shard = (result[0] if isinstance(result, tuple) else result)[0]
    gpu, cpu = make_worker(llama, "cuda", sharding=sharding, **config), make_worker(llama, "cpu", **config)
    for _ in range(3):
        actual, expected = gpu.train(shard, advantage_loss), cpu.train(shard, advantage_loss)
        assert actual.metrics == pytest.approx(expected.metrics, rel=1e-2, abs=1e-3)
    torch.testing.assert_close(gpu.get_logprobs(shard), cpu.get_logprobs(shard), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_bfloat16_trains_float32_weights(llama: Path, sharding: str, activation_checkpointing: bool) -> None:
    worker = make_worker(
        llama, "cuda", sharding=sharding, precision="bfloat16", activation_checkpointing=activation_checkpointing
    )
    batch = make_batch()
    losses = [worker.train(batch, advantage_loss).metrics["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in weights(worker).values()} == {torch.float32}


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_non_finite_loss_changes_nothing(llama: Path, sharding: str) -> None:
    worker = make_worker(llama, "cuda", sharding=sharding)
    before = weights(worker)
    with pytest.raises(NonFiniteError):
        worker.train(make_batch(), nan_loss)
    assert_equal(before, weights(worker))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_checkpoint_restores_weights_and_optimizer(llama: Path, tmp_path: Path, sharding: str) -> None:
    worker = make_worker(llama, "cuda", sharding=sharding)
    worker.train(make_batch(), advantage_loss)
    worker.save_checkpoint(tmp_path)
    expected, draw = weights(worker), torch.rand(3, device="cuda")
    worker.shutdown()
    loaded = make_worker(llama, "cuda", sharding=sharding)
    loaded.load_checkpoint(tmp_path)
    assert_equal(expected, weights(loaded))
    assert torch.equal(torch.rand(3, device="cuda"), draw)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_published_weights_match_the_cpu(llama: Path, sharding: str) -> None:
    update = make_worker(llama, "cuda", sharding=sharding).publish_weights(1, "float32")
    expected = make_worker(llama, "cpu").publish_weights(1, "float32")
    assert update is not None
    assert expected is not None
    assert update.digest == expected.digest


def train_as_rank(rank: int, model: Path, sharding: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    worker = make_worker(model, "cuda", sharding=sharding)
    losses = [worker.train(make_batch().chunk(rank, 2), advantage_loss).metrics["loss"] for _ in range(3)]
    return losses, weights(worker)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_gpus_train_like_one(llama: Path, two_gpus: RankProcesses, sharding: str) -> None:
    (losses, first), (_, second) = two_gpus.run(train_as_rank, llama, sharding)
    assert_equal(first, second)
    alone = make_worker(llama, "cuda")
    expected = [alone.train(make_batch(), advantage_loss).metrics["loss"] for _ in range(3)]
    assert losses == pytest.approx(expected, rel=1e-2, abs=1e-3)
