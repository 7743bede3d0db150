"""What ranks of a Megatron policy do in the tests. Imported in the MCORE venv, which has no pytest."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_policy import EPS, advantage_loss, make_batch, nan_loss, shard_of

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ModelError, NonFiniteError
from nemo_rl.models.policy.config import PolicyConfig
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
    """This rank's rows of the batch that all tests take."""
    data, batching = worker._grid.data, worker._config.batching
    return shard_of(make_batch(), data.rank, data.world_size, batching=batching.model_dump())


def state_of(worker: MegatronPolicyWorker) -> State:
    """Master weights and moments by Hugging Face name, on rank 0. A collective."""
    state = {name: tensor.cpu().clone() for name, tensor in worker._state.weights()}
    state.update({key: tensor.cpu().clone() for key, tensor in worker._state.moments()})
    return state if worker._grid.world.rank == 0 else {}


def alone(rank: int) -> bool:
    """Let rank 0 be a process group of its own; the others have nothing to do."""
    os.environ.update(WORLD_SIZE="1")
    return rank == 0


def logprobs(rank: int, model: Path, config: dict[str, Any], single: bool = False) -> Any:
    """Log-probabilities of this rank's shard, and whether the frozen reference gives the same bits."""
    world_size = os.environ["WORLD_SIZE"]
    try:
        if single and not alone(rank):
            return None
        with megatron_worker(model, **config) as worker:
            shard = shard_for(worker)
            found = worker.get_logprobs(shard)
            return found, torch.equal(found, worker.get_reference_policy_logprobs(shard)), worker.attestation()
    finally:
        os.environ["WORLD_SIZE"] = world_size


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
    """Metrics of each step, and the state after the last one on rank 0."""
    with megatron_worker(model, device_type, **config) as worker:
        if load is not None:
            worker.load_checkpoint(load)
        shard = shard_for(worker)
        results = [worker.train(shard, advantage_loss) for _ in range(steps)]
        if save is not None:
            worker.save_checkpoint(save)
        results += [worker.train(shard, advantage_loss) for _ in range(steps_after_save)]
        return results, state_of(worker)


def is_gone_after_shutdown(rank: int, model: Path, config: dict[str, Any]) -> bool:
    """Whether nothing holds the model, and with it its memory, once its worker has been shut down and let go."""
    with megatron_worker(model, **config) as worker:
        worker.train(shard_for(worker), advantage_loss)
        found = weakref.ref(worker._forward._model)
    del worker
    gc.unfreeze()
    gc.collect()
    return found() is None


def served(rank: int, model: Path, config: dict[str, Any]) -> str:
    """Digest of the weights that every rank gathers, where every rank sends."""
    with megatron_worker(model, **config) as worker:
        return digest_tensors(worker._state.served_weights(on_all_ranks=True))


def publish(rank: int, model: Path, config: dict[str, Any], device_type: str = "cpu") -> Any:
    """Digest and names of the published weights, and all weights read back, on rank 0."""
    with megatron_worker(model, device_type, **config) as worker:
        update = worker.publish_weights(7, "float32")
        weights = {name: tensor.clone() for name, tensor in worker._state.weights()}
        if update is None:
            return None
        return update.digest, [spec.name for bucket in update.buckets for spec in bucket.tensors], weights


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
    """The error that the worker's start ends with."""
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


def train_in_turns(rank: int, model: Path, config: dict[str, Any], *, offloads: bool) -> Any:
    """Five steps with what a run does in between, while the device's memory is given away and taken back, or not."""
    with megatron_worker(model, **config) as worker:
        shard = shard_for(worker)
        # The digest of what needs no cast looks at the weights through numpy, and on a CPU such memory has to stay.
        dtype = "bfloat16" if worker._config.precision == "float32" else "float32"
        found: list[Any] = []
        for step in range(5):
            if offloads:
                worker.offload(keep_weights=True)
            update = worker.publish_weights(step, dtype)
            found.append(update and update.digest)
            if offloads:
                worker.offload()
                assert bytes_on_device(worker) == 0
            found.append(worker.get_logprobs(shard).tolist())
            found.append(worker.get_reference_policy_logprobs(shard).tolist())
            found.append(worker.train(shard, advantage_loss).metrics)
        if offloads:
            worker.offload()
            assert refuses_to_compute(worker)
            worker._memory.need(Part.WEIGHTS, Part.OPTIMIZER)
        return found, state_of(worker)


def bytes_on_device(worker: MegatronPolicyWorker) -> int:
    """Of all storages that weights, buffers of gradients and the optimizer have."""
    wrapped = worker._optimizer._model
    buffers = [data for buffer in wrapped.buffers for data in (buffer.grad_data, buffer.param_data) if data is not None]
    tensors = [*wrapped.parameters(), *buffers, *worker._optimizer.state_tensors()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def refuses_to_compute(worker: MegatronPolicyWorker) -> bool:
    try:
        worker._optimizer._model(torch.ones(1, 2, dtype=torch.int64))
    except ModelError as error:
        return "are in the host's memory" in str(error)
    return False


def memory_of_phases(rank: int, model: Path, config: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Parameters of a worker on a GPU, and the bytes that it has allocated there in each phase of a step."""
    start = torch.cuda.memory_allocated()
    phases: dict[str, int] = {}
    with megatron_worker(model, "cuda", **config) as worker:

        def note(phase: str) -> None:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            phases[phase] = torch.cuda.memory_allocated() - start

        shard = shard_for(worker)
        worker.train(shard, advantage_loss)
        note("trained")
        worker.offload(keep_weights=True)
        note("weights are kept")
        worker.offload()
        note("away")
        worker.publish_weights(1, "float32")
        note("sent")
        worker.get_logprobs(shard)
        note("logprobs")
        worker.train(shard, advantage_loss)
        note("trained again")
        return worker.attestation()["num_parameters"], phases


def checkpoint_in_turns(
    rank: int, model: Path, config: dict[str, Any], directory: Path, device_type: str = "cpu"
) -> bool:
    """Whether a checkpoint that is saved, and loaded, while everything is away is the state itself."""
    with megatron_worker(model, device_type, **config) as worker:
        worker.train(shard_for(worker), advantage_loss)
        expected = state_of(worker)
        worker.offload()
        worker.save_checkpoint(directory)
        worker.train(shard_for(worker), advantage_loss)
        worker.offload()
        worker.load_checkpoint(directory)
        found = state_of(worker)
        return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
