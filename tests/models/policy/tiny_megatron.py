"""Scenarios for ranks of a Megatron policy. The MCORE venv, which has no pytest, imports this module."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_policy import EPS, advantage_loss, make_batch, nan_loss, pairs_batch, shard_of

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ModelError, NonFiniteError
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.interfaces import LossFunction, TrainResult
from nemo_rl.models.policy.megatron_policy_worker import MegatronPolicyWorker
from nemo_rl.models.policy.offload import Part
from nemo_rl.models.weights.digest import digest_tensors

State = dict[str, torch.Tensor]


def make_config(model: Path | str, **config: Any) -> PolicyConfig:
    defaults: dict[str, Any] = {
        "backend": "megatron",
        "num_threads": 1,
        "max_sequence_length": 64,
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "eps": EPS},
        "scheduler": {"kind": "cosine", "warmup_steps": 2},
        "max_grad_norm": 0.5,
        "train_micro_batch_size": 3,
        "logprob_batch_size": 5,
    }
    return PolicyConfig(model_name=str(model), **(defaults | config))


@contextmanager
def megatron_worker(model: Path | str, device_type: str = "cpu", **config: Any) -> Iterator[MegatronPolicyWorker]:
    worker = MegatronPolicyWorker(
        make_config(model, **config), total_steps=20, seed=3, device_type=device_type, weight_transport="local"
    )
    try:
        yield worker
    finally:
        worker.shutdown()


def shard_for(worker: MegatronPolicyWorker) -> BatchedDataDict:
    """Return this rank's rows of the batch that all tests use."""
    data, batching = worker._grid.data, worker._config.batching
    return shard_of(make_batch(), data.rank, data.world_size, batching=batching.model_dump())


def state_of(worker: MegatronPolicyWorker) -> State:
    """Return master weights and moments by Hugging Face name on rank 0. A collective."""
    state = {name: tensor.cpu().clone() for name, tensor in worker._state.weights()}
    state.update({key: tensor.cpu().clone() for key, tensor in worker._state.moments()})
    return state if worker._grid.world.rank == 0 else {}


def alone(rank: int) -> bool:
    """Make rank 0 a single process; returns False on the other ranks, which do nothing."""
    os.environ.update(WORLD_SIZE="1")
    return rank == 0


def logprobs(rank: int, model: Path, config: dict[str, Any], single: bool = False) -> Any:
    """Return log-probabilities of this rank's shard, and whether those of the reference are bit-identical."""
    world_size = os.environ["WORLD_SIZE"]
    try:
        if single and not alone(rank):
            return None
        with megatron_worker(model, **config) as worker:
            shard = shard_for(worker)
            actual = worker.get_logprobs(shard)
            return actual, torch.equal(actual, worker.get_reference_policy_logprobs(shard)), worker.attestation()
    finally:
        os.environ["WORLD_SIZE"] = world_size


def train_with_losses(
    rank: int, model: Path, config: dict[str, Any], batch: BatchedDataDict, losses: list[LossFunction]
) -> tuple[list[TrainResult], State]:
    """Train one step with each loss on the same batch; returns the results, and the state on rank 0."""
    with megatron_worker(model, **config) as worker:
        data = worker._grid.data
        shard = shard_of(batch, data.rank, data.world_size)
        return [worker.train(shard, loss) for loss in losses], state_of(worker)


def train(
    rank: int,
    model: Path,
    config: dict[str, Any],
    steps: int = 3,
    *,
    load: Path | None = None,
    save: Path | None = None,
    steps_after_save: int = 0,
    device_type: str = "cpu",
) -> Any:
    """Return the metrics of each step, and on rank 0 the state after the last one."""
    with megatron_worker(model, device_type, **config) as worker:
        if load is not None:
            worker.load_checkpoint(load)
        shard = shard_for(worker)
        results = [worker.train(shard, advantage_loss) for _ in range(steps)]
        if save is not None:
            worker.save_checkpoint(save)
        results += [worker.train(shard, advantage_loss) for _ in range(steps_after_save)]
        return results, state_of(worker)


def train_on_pairs(rank: int, model: Path, config: dict[str, Any], loss_fn: Any) -> list[dict[str, float]]:
    """Return the metrics of three steps on pairs."""
    with megatron_worker(model, **config) as worker:
        data = worker._grid.data
        shard = shard_of(pairs_batch(), data.rank, data.world_size, rows_per_group=2, **config)
        return [worker.train(shard, loss_fn).metrics for _ in range(3)]


def is_freed_after_shutdown(rank: int, model: Path, config: dict[str, Any]) -> bool:
    """Return whether the model is garbage-collected after its worker has been shut down and deleted."""
    with megatron_worker(model, **config) as worker:
        worker.train(shard_for(worker), advantage_loss)
        actual = weakref.ref(worker._forward._model)
    del worker
    gc.unfreeze()
    gc.collect()
    return actual() is None


def served(rank: int, model: Path, config: dict[str, Any]) -> str:
    """Return the digest of the weights gathered on every rank, as for streams that every rank sends."""
    with megatron_worker(model, **config) as worker:
        return digest_tensors(worker._state.served_weights(on_all_ranks=True))


def publish(rank: int, model: Path, config: dict[str, Any], device_type: str = "cpu") -> Any:
    """Return on rank 0 the digest and the names of the published weights, and all weights."""
    with megatron_worker(model, device_type, **config) as worker:
        update = worker.publish_weights(7, "float32")
        weights = {name: tensor.clone() for name, tensor in worker._state.weights()}
        if update is None:
            return None
        return update.digest, [spec.name for bucket in update.buckets for spec in bucket.tensors], weights


def num_expert_weights(rank: int, model: Path, config: dict[str, Any]) -> int:
    with megatron_worker(model, **config) as worker:
        parameters = worker._optimizer._model.module.named_parameters()
        return sum(parameter.numel() for name, parameter in parameters if ".experts." in name)


def not_finite_changes_nothing(rank: int, model: Path, config: dict[str, Any]) -> bool:
    with megatron_worker(model, **config) as worker:
        shard = shard_for(worker)
        worker.train(shard, advantage_loss)
        before = state_of(worker)
        try:
            worker.train(shard, nan_loss)
        except NonFiniteError:
            after = state_of(worker)
            return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        return False


def refused(rank: int, model: Path, config: dict[str, Any]) -> str:
    """Return the error of the worker's start."""
    try:
        with megatron_worker(model, **config):
            return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def load_fails(rank: int, model: Path, directory: Path) -> str:
    with megatron_worker(model) as worker:
        try:
            worker.load_checkpoint(directory)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def train_with_offload(rank: int, model: Path, config: dict[str, Any], *, offloads: bool) -> Any:
    """Train five steps with every call of a run in between, with or without offloading."""
    with megatron_worker(model, **config) as worker:
        shard = shard_for(worker)
        # Without a cast, the digest reads the weights through numpy, and on a CPU such memory cannot move.
        dtype = "bfloat16" if worker._config.precision == "float32" else "float32"
        actual: list[Any] = []
        for step in range(5):
            if offloads:
                worker.offload(keep_weights=True)
            update = worker.publish_weights(step, dtype)
            actual.append(update and update.digest)
            if offloads:
                worker.offload()
                assert bytes_on_device(worker) == 0
            actual.append(worker.get_logprobs(shard).tolist())
            actual.append(worker.get_reference_policy_logprobs(shard).tolist())
            actual.append(worker.train(shard, advantage_loss).metrics)
        if offloads:
            worker.offload()
            assert refuses_to_compute(worker)
            worker._memory.load(Part.WEIGHTS, Part.OPTIMIZER)
        return actual, state_of(worker)


def bytes_on_device(worker: MegatronPolicyWorker) -> int:
    """Sum the bytes of all storages of weights, gradient buffers and the optimizer."""
    wrapped = worker._optimizer._model
    all_buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    buffers = [data for buffer in all_buffers for data in (buffer.grad_data, buffer.param_data) if data is not None]
    tensors = [*wrapped.parameters(), *buffers, *worker._optimizer.state_tensors()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def refuses_to_compute(worker: MegatronPolicyWorker) -> bool:
    try:
        worker._optimizer._model(torch.ones(1, 2, dtype=torch.int64))
    except ModelError as error:
        return "are in the host's memory" in str(error)
    return False


def memory_by_phase(rank: int, model: Path, config: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Return the number of parameters of a worker on a GPU, and its allocated bytes in each phase of a step."""
    start = torch.cuda.memory_allocated()
    phases: dict[str, int] = {}
    with megatron_worker(model, "cuda", **config) as worker:

        def record(phase: str) -> None:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            phases[phase] = torch.cuda.memory_allocated() - start

        shard = shard_for(worker)
        worker.train(shard, advantage_loss)
        record("trained")
        worker.offload(keep_weights=True)
        record("weights kept")
        worker.offload()
        record("offloaded")
        worker.publish_weights(1, "float32")
        record("sent")
        worker.get_logprobs(shard)
        record("logprobs")
        worker.train(shard, advantage_loss)
        record("trained again")
        return worker.attestation()["num_parameters"], phases


def checkpoint_while_offloaded(
    rank: int, model: Path, config: dict[str, Any], directory: Path, device_type: str = "cpu"
) -> bool:
    """Return whether a checkpoint that is saved and loaded while everything is offloaded restores the state."""
    with megatron_worker(model, device_type, **config) as worker:
        worker.train(shard_for(worker), advantage_loss)
        expected = state_of(worker)
        worker.offload()
        worker.save_checkpoint(directory)
        worker.train(shard_for(worker), advantage_loss)
        worker.offload()
        worker.load_checkpoint(directory)
        actual = state_of(worker)
        return actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in actual)
