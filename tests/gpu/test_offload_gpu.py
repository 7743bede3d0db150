"""What a policy holds of a GPU's memory in each phase of a step that it shares with generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import VOCABULARY, advantage_loss, assert_equal, make_batch, make_model, make_worker, weights

from nemo_rl.errors import ModelError
from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
# 24 million parameters.
SIZE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "head_dim": 64,
}
# Blocks of the allocator are rounded up, buffers stay, and FSDP keeps the layer that it has gathered last.
SLACK = 24 * MIB


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", **SIZE)


def allocated_since(start: int) -> int:
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # tens of MiB per thread that multiplies
    return torch.cuda.memory_allocated() - start


def started(llama: Path, sharding: str, **config: Any) -> tuple[TorchPolicyWorker, int, int]:
    """A worker that has trained, bytes of its weights, and what was allocated before it came."""
    start = allocated_since(0)
    worker = make_worker(llama, "cuda", sharding=sharding, **config)
    worker.train(make_batch(), advantage_loss)
    num_bytes = 4 * worker.attestation()["num_parameters"]
    assert num_bytes > 2 * SLACK
    return worker, num_bytes, start


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_memory_of_each_phase(llama: Path, sharding: str, precision: str) -> None:
    worker, of_weights, start = started(llama, sharding, precision=precision)
    assert allocated_since(start) == pytest.approx(3 * of_weights, abs=SLACK)  # weights and two moments
    worker.offload(keep_weights=True)
    assert allocated_since(start) == pytest.approx(of_weights, abs=SLACK)
    worker.publish_weights(1, "bfloat16")
    assert allocated_since(start) == pytest.approx(of_weights, abs=SLACK)
    worker.offload()
    assert allocated_since(start) < SLACK
    worker.publish_weights(2, "bfloat16")  # for the successor of a generation worker
    assert allocated_since(start) < SLACK
    worker.get_reference_policy_logprobs(make_batch())
    assert allocated_since(start) < SLACK
    worker.get_logprobs(make_batch())
    assert allocated_since(start) == pytest.approx(of_weights, abs=SLACK)
    worker.train(make_batch(), advantage_loss)
    assert allocated_since(start) == pytest.approx(3 * of_weights, abs=SLACK)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_other_processes_can_take_what_has_left(llama: Path, sharding: str) -> None:
    worker, of_weights, _ = started(llama, sharding)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    worker.offload()
    assert torch.cuda.mem_get_info()[0] - free > 0.8 * 3 * of_weights


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_every_bit_comes_back(llama: Path, sharding: str) -> None:
    worker, _, _ = started(llama, sharding)
    for _ in range(3):
        expected = weights(worker)
        worker.offload()
        filler = torch.full((256 * MIB,), 255, dtype=torch.uint8, device="cuda")  # what generation does with the memory
        del filler
        worker._memory.need(*worker._memory._parts)
        assert_equal(weights(worker), expected)
        worker.train(make_batch(), advantage_loss)


def test_pinned_memory_is_taken_once(llama: Path) -> None:
    worker, of_weights, _ = started(llama, "ddp")
    worker.offload()
    chunks = [chunk for part in worker._memory._parts.values() for chunk in getattr(part, "_host", _NoHost)._chunks]
    assert all(chunk.is_pinned() for chunk in chunks)
    assert sum(chunk.numel() for chunk in chunks) == pytest.approx(3 * of_weights, abs=SLACK)
    worker.train(make_batch(), advantage_loss)
    worker.offload()
    again = [chunk for part in worker._memory._parts.values() for chunk in getattr(part, "_host", _NoHost)._chunks]
    assert [chunk.data_ptr() for chunk in again] == [chunk.data_ptr() for chunk in chunks]


class _NoHost:
    _chunks: tuple[torch.Tensor, ...] = ()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_weights_that_are_away_are_refused(llama: Path, sharding: str) -> None:
    worker, _, _ = started(llama, sharding)
    worker.offload()
    with pytest.raises(ModelError, match="are in the host's memory"):
        worker._model.module(input_ids=torch.randint(VOCABULARY, (1, 4), device="cuda"))
    torch.cuda.synchronize()  # no kernel has read from nowhere


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_memory_of_each_phase_of_megatron(llama: Path, one_gpu: RankProcesses, distributed_optimizer: bool) -> None:
    config = {"precision": "bfloat16", "options": {"distributed_optimizer": distributed_optimizer}}
    ((num_parameters, phases),) = one_gpu.run("tiny_megatron.memory_of_phases", llama, config)
    expected = {
        # Weights in bfloat16; gradients, master weights and two moments in float32.
        "trained": (2 + 4 + 4 + 8) * num_parameters,
        "weights are kept": 2 * num_parameters,
        "away": 0,
        "sent": 0,
        "logprobs": 2 * num_parameters,
        "trained again": (2 + 4 + 4 + 8) * num_parameters,
    }
    assert phases == {phase: pytest.approx(num_bytes, abs=SLACK) for phase, num_bytes in expected.items()}


@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_checkpoint_of_megatron_whose_memory_is_away(
    llama: Path, one_gpu: RankProcesses, tmp_path: Path, precision: str, distributed_optimizer: bool
) -> None:
    config = {"precision": precision, "options": {"distributed_optimizer": distributed_optimizer}}
    assert one_gpu.run("tiny_megatron.checkpoint_in_turns", llama, config, tmp_path, device_type="cuda") == [True]
