"""The Megatron worker on CUDA devices, compared with the torch worker on the CPU.

The ranks run in a Python with megatron-core: this one, or that of the MCORE venv.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import advantage_loss, assert_equal, make_batch, make_model, make_worker, weights

from nemo_rl.models.policy.interfaces import TrainResult

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
TRAIN = "tiny_megatron.train"
CUDA = {"device_type": "cuda"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


def assert_trained_like_torch_on_the_cpu(model: Path, results: list[TrainResult], state: dict[str, Any]) -> None:
    alone = make_worker(model)
    for actual in results:
        expected = alone.train(make_batch(), advantage_loss)
        assert actual.metrics == pytest.approx(expected.metrics, rel=1e-2, abs=1e-3)
    for name, tensor in weights(alone).items():
        if "/" not in name:
            torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_float32_matches_torch_on_the_cpu(
    qwen: Path, one_gpu: RankProcesses, mode: str, distributed_optimizer: bool
) -> None:
    config = {"options": {"distributed_optimizer": distributed_optimizer}, **MODES[mode]}
    ((results, state),) = one_gpu.run(TRAIN, qwen, config, **CUDA)
    assert_trained_like_torch_on_the_cpu(qwen, results, state)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_bfloat16_trains_float32_weights(qwen: Path, one_gpu: RankProcesses, activation_checkpointing: bool) -> None:
    config = {"precision": "bfloat16", "activation_checkpointing": activation_checkpointing}
    ((results, state),) = one_gpu.run(TRAIN, qwen, config, 8, **CUDA)
    assert results[-1].metrics["loss"] < results[0].metrics["loss"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_checkpoint_restores_weights_and_optimizer(qwen: Path, one_gpu: RankProcesses, tmp_path: Path) -> None:
    config = {"precision": "bfloat16"}
    ((_, saved),) = one_gpu.run(TRAIN, qwen, config, 2, save=tmp_path, **CUDA)
    ((_, loaded),) = one_gpu.run(TRAIN, qwen, config, 0, load=tmp_path, **CUDA)
    assert_equal(saved, loaded)


def test_published_weights_match_the_cpu(qwen: Path, one_gpu: RankProcesses) -> None:
    expected = make_worker(qwen).publish_weights(7, "float32")
    assert expected is not None
    (published,) = one_gpu.run("tiny_megatron.publish", qwen, {}, **CUDA)
    assert published[0] == expected.digest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_train_like_one_cpu(qwen: Path, two_gpus_of_megatron: RankProcesses, layout: str) -> None:
    (results, state), _ = two_gpus_of_megatron.run(TRAIN, qwen, {"options": LAYOUTS[layout]}, **CUDA)
    assert_trained_like_torch_on_the_cpu(qwen, results, state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gathered_weights_are_exact(qwen: Path, two_gpus_of_megatron: RankProcesses, layout: str) -> None:
    published, _ = two_gpus_of_megatron.run("tiny_megatron.publish", qwen, {"options": LAYOUTS[layout]}, **CUDA)
    update = make_worker(qwen).publish_weights(7, "float32")
    assert update is not None
    assert published[0] == update.digest
