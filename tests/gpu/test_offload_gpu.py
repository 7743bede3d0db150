"""GPU memory of a policy in each phase of a step that shares the GPU with generation."""

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
# The allocator rounds blocks up, model buffers stay, and FSDP keeps the layer that it gathered last.
SLACK = 24 * MIB


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", **SIZE)


def allocated_since(start: int) -> int:
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # tens of MiB per thread that uses cuBLAS
    return torch.cuda.memory_allocated() - start


def started(llama: Path, sharding: str, **config: Any) -> tuple[TorchPolicyWorker, int, int]:
    """Return a worker after one step, the bytes of its weights, and the bytes allocated before it."""
    start = allocated_since(0)
    worker = make_worker(llama, "cuda", sharding=sharding, **config)
    worker.train(make_batch(), advantage_loss)
    num_bytes = 4 * worker.attestation()["num_parameters"]
    assert num_bytes > 2 * SLACK
    return worker, num_bytes, start


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_memory_of_each_phase(llama: Path, sharding: str, precision: str) -> None:
    worker, weight_bytes, start = started(llama, sharding, precision=precision)
    assert allocated_since(start) == pytest.approx(3 * weight_bytes, abs=SLACK)  # weights and two moments
    worker.offload(keep_weights=True)
    assert allocated_since(start) == pytest.approx(weight_bytes, abs=SLACK)
    worker.publish_weights(1, "bfloat16")
    assert allocated_since(start) == pytest.approx(weight_bytes, abs=SLACK)
    worker.offload()
    assert allocated_since(start) < SLACK
    worker.publish_weights(2, "bfloat16")  # for a restarted generation worker
    assert allocated_since(start) < SLACK
    worker.get_reference_policy_logprobs(make_batch())
    assert allocated_since(start) < SLACK
    worker.get_logprobs(make_batch())
    assert allocated_since(start) == pytest.approx(weight_bytes, abs=SLACK)
    worker.train(make_batch(), advantage_loss)
    assert allocated_since(start) == pytest.approx(3 * weight_bytes, abs=SLACK)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_offloaded_memory_is_free_for_other_processes(llama: Path, sharding: str) -> None:
    worker, weight_bytes, _ = started(llama, sharding)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    worker.offload()
    assert torch.cuda.mem_get_info()[0] - free > 0.8 * 3 * weight_bytes


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_offloaded_state_is_bit_exact(llama: Path, sharding: str) -> None:
    worker, _, _ = started(llama, sharding)
    for _ in range(3):
        expected = weights(worker)
        worker.offload()
        filler = torch.full(
            (256 * MIB,), 255, dtype=torch.uint8, device="cuda"
        )  # overwrites the memory, as generation does
        del filler
        worker._memory.load(*worker._memory._parts)
        assert_equal(weights(worker), expected)
        worker.train(make_batch(), advantage_loss)


def test_pinned_memory_is_allocated_once(llama: Path) -> None:
    worker, weight_bytes, _ = started(llama, "ddp")
    worker.offload()
    chunks = [chunk for part in worker._memory._parts.values() for chunk in getattr(part, "_host", _NoHost)._chunks]
    assert all(chunk.is_pinned() for chunk in chunks)
    assert sum(chunk.numel() for chunk in chunks) == pytest.approx(3 * weight_bytes, abs=SLACK)
    worker.train(make_batch(), advantage_loss)
    worker.offload()
    again = [chunk for part in worker._memory._parts.values() for chunk in getattr(part, "_host", _NoHost)._chunks]
    assert [chunk.data_ptr() for chunk in again] == [chunk.data_ptr() for chunk in chunks]


class _NoHost:
    _chunks: tuple[torch.Tensor, ...] = ()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_offloaded_model_refuses_to_run(llama: Path, sharding: str) -> None:
    worker, _, _ = started(llama, sharding)
    worker.offload()
    with pytest.raises(ModelError, match="are in the host's memory"):
        worker._model.module(input_ids=torch.randint(VOCABULARY, (1, 4), device="cuda"))
    torch.cuda.synchronize()  # no kernel has read from address 0


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_megatron_memory_of_each_phase(llama: Path, one_gpu: RankProcesses, distributed_optimizer: bool) -> None:
    config = {"precision": "bfloat16", "options": {"distributed_optimizer": distributed_optimizer}}
    ((num_parameters, phases),) = one_gpu.run("tiny_megatron.memory_by_phase", llama, config)
    expected = {
        # Weights in bfloat16; gradients, master weights and two moments in float32.
        "trained": (2 + 4 + 4 + 8) * num_parameters,
        "weights kept": 2 * num_parameters,
        "offloaded": 0,
        "sent": 0,
        "logprobs": 2 * num_parameters,
        "trained again": (2 + 4 + 4 + 8) * num_parameters,
    }
    assert phases == {phase: pytest.approx(num_bytes, abs=SLACK) for phase, num_bytes in expected.items()}


@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_megatron_checkpoint_while_offloaded(
    llama: Path, one_gpu: RankProcesses, tmp_path: Path, precision: str, distributed_optimizer: bool
) -> None:
    config = {"precision": precision, "options": {"distributed_optimizer": distributed_optimizer}}
    assert one_gpu.run("tiny_megatron.checkpoint_while_offloaded", llama, config, tmp_path, device_type="cuda") == [
        True
    ]
