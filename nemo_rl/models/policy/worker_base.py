"""The base class of policy workers.

Per optimizer step, on every rank::

    shard of a global batch ─► micro-batches ─► forward, loss, backward ─► sum of gradients over ranks ─► clip, AdamW
                                    └── gradients and metrics add up ──┘

A backend adds the model: how it is built and divided over the ranks, its forward pass and its optimizer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy import policy_checkpoint
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.interfaces import LossFunction, TrainResult
from nemo_rl.models.policy.microbatching import MicrobatchLoss, global_batches, microbatches
from nemo_rl.models.policy.model_worker_base import ModelWorker, join_microbatches
from nemo_rl.models.policy.offload import Part, PolicyMemory, Scratch, StoredTensors, Tensors, borrows, needs
from nemo_rl.models.policy.process_group import ProcessGroup
from nemo_rl.models.policy.reductions import GlobalCounts, MetricSums
from nemo_rl.models.routed_experts import ROUTED_EXPERTS
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.models.weights.sender import WeightSender
from nemo_rl.models.weights.stream import Endpoint, WeightStreamer
from nemo_rl.utils.garbage import freeze_modules, gc_paused


class PolicyForward(Protocol):
    """The forward pass of a model over micro-batches. All methods are collectives."""

    def train(self, parts: Iterable[BatchedDataDict], loss: MicrobatchLoss) -> None:
        """Run forward and backward passes; then every gradient is the sum over micro-batches and ranks."""

    def logprobs(self, parts: Iterable[BatchedDataDict]) -> Iterable[torch.Tensor]:
        """Return [b, T] float32 log-probabilities per micro-batch, without gradient."""


class Optimizer(Protocol):
    """The optimizer of a worker; see `PolicyOptimizer`."""

    @property
    def lr(self) -> float: ...

    def zero_grad(self) -> None: ...

    def step(self, loss: float) -> float: ...

    def state_tensors(self) -> Iterable[torch.Tensor]: ...


class PolicyWorker(ModelWorker):
    """Trains a Hugging Face causal language model on its shard of every batch.

    A worker runs with or without Ray: a process with `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` set is one
    of several, a process with none of them is the only one. All methods but `weight_endpoint`, `attestation` and
    `shutdown` are collectives: every rank calls them in the same order.

    Args:
        config: the policy section. `model_name` is a directory or hub name; the driver has resolved `embedded`.
        total_steps: optimizer steps of the whole run, for schedules without a `total_steps` of their own.
        seed: seed of the run.
        num_local_workers: workers on this node, which share its CPUs; None takes `WORLD_SIZE`.
        device_type: "cuda", "cpu", or None for a GPU if there is one.
        weight_transport: transport of published weights: a name in `nemo_rl.models.weights.transports.TRANSPORTS`.
        weight_stream_transport: transport of streamed weights.

    Raises:
        ConfigError: the configuration does not fit the backend or the number of workers.
        ModelError: the model cannot be loaded, or does not fit the configuration.
        WorkerError: the process group cannot be initialized, or there is no GPU.
    """

    # `_build` sets these.
    _forward: PolicyForward
    _optimizer: Optimizer
    _state: policy_checkpoint.TrainedState

    @gc_paused()
    def __init__(
        self,
        config: PolicyConfig,
        *,
        total_steps: int,
        seed: int,
        num_local_workers: int | None = None,
        device_type: str | None = None,
        weight_transport: str = "ray",
        weight_stream_transport: str = "shared_memory",
    ) -> None:
        self._sender = WeightSender(weight_transport, config.weight_bucket_mib << 20)
        self._streamer = WeightStreamer(weight_stream_transport, config.weight_stream_bucket_bytes)
        super().__init__(config, seed=seed, num_local_workers=num_local_workers, device_type=device_type)
        self._reference: PolicyForward | None = None
        self._build(total_steps)

    @property
    def _data_ranks(self) -> ProcessGroup:
        """The data-parallel ranks, each with its own shard of the batch."""
        return self._group

    @abstractmethod
    def _build(self, total_steps: int) -> None:
        """Build the model and its optimizer: set `_forward`, `_optimizer`, `_state` and `_memory`."""

    @abstractmethod
    def _load_reference(self) -> PolicyForward:
        """Build the frozen model with the initial weights, and register its memory with `_track_reference`."""

    def _on_all_ranks(self, result: Any) -> Any:
        """Broadcast a result from the ranks that hold it, such as the last pipeline stage, to all ranks. A
        collective."""
        return result

    def _track_memory(self, model: nn.Module, weights: Tensors, gradients: Scratch) -> PolicyMemory:
        """Create the `PolicyMemory` with the parts that `offload` moves. Calling `model` raises `ModelError` while its
        weights are on the host."""
        device = self._group.device
        memory = PolicyMemory(device)
        memory.add(Part.WEIGHTS, StoredTensors(weights, device))
        memory.add(Part.GRADIENTS, gradients)
        memory.add(Part.OPTIMIZER, StoredTensors(self._optimizer.state_tensors, device))
        memory.guard(model, Part.WEIGHTS)
        return memory

    def _track_reference(self, model: nn.Module, weights: Tensors) -> None:
        self._memory.add(Part.REFERENCE, StoredTensors(weights, self._group.device, constant=True))
        self._memory.guard(model, Part.REFERENCE)

    @needs(Part.WEIGHTS, Part.GRADIENTS)
    def train(self, shard: BatchedDataDict, loss_fn: LossFunction, local_batch_size: int | None = None) -> TrainResult:
        """Take one optimizer step per `local_batch_size` rows of this rank's shard (None: one step for all rows).

        A shard with a plan of micro-batches defines its global batches; then `local_batch_size` is ignored. Metrics
        are averaged over optimizer steps.

        Raises:
            NonFiniteError: on every rank; the weights are as before that optimizer step.
            DataError: the rows cannot be divided evenly into optimizer batches.
        """
        self._memory.prefetch(Part.OPTIMIZER)  # its copy runs while the gradients are computed
        batches = global_batches(shard, local_batch_size)
        totals: dict[str, float] = {}
        num_tokens = 0
        for batch in batches:
            metrics, num_forward_tokens = self._take_step(batch, loss_fn)
            num_tokens += num_forward_tokens
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value
        return TrainResult({name: value / len(batches) for name, value in totals.items()}, len(batches), num_tokens)

    def _take_step(self, batch: BatchedDataDict, loss_fn: LossFunction) -> tuple[dict[str, float], int]:
        """Take one optimizer step; returns its metrics and the number of tokens in the forward passes."""
        counts = GlobalCounts.over(batch, self._data_ranks)
        sums = MetricSums()

        def loss_of(logprobs: torch.Tensor, part: BatchedDataDict) -> torch.Tensor:
            loss, metrics = loss_fn(logprobs, part, counts.num_tokens, counts.num_samples)
            sums.add({"loss": loss.detach(), **metrics})
            return loss

        config = self._config
        self._optimizer.zero_grad()  # a loss function that raised may have left gradients
        parts = microbatches(batch, config.train_micro_batch_size, config.batching.length_multiple)
        self._forward.train(parts, loss_of)
        metrics: dict[str, float] = self._on_all_ranks(sums.reduced(self._data_ranks))
        metrics["lr"] = self._optimizer.lr
        self._memory.load(Part.OPTIMIZER)
        metrics["grad_norm"] = self._optimizer.step(metrics["loss"])
        return metrics, counts.num_forward_tokens

    @needs(Part.WEIGHTS)
    def get_logprobs(self, shard: BatchedDataDict) -> torch.Tensor:
        """Return the log-probabilities of this rank's rows, [b, T] float32 on the CPU, in the shard's order."""
        return self._logprobs(self._forward, shard)

    @borrows(Part.REFERENCE)
    def get_reference_policy_logprobs(self, shard: BatchedDataDict) -> torch.Tensor:
        """Return the log-probabilities under the initial weights, which the first call loads from `model_name`.

        The reference is built exactly as the policy is, so both agree to the last bit until the first step. A
        checkpoint replaces the policy's weights only, and never holds the reference's.
        """
        if self._reference is None:
            self._reference = self._load_reference()
            freeze_modules()
        return self._logprobs(self._reference, shard)

    def _logprobs(self, forward: PolicyForward, shard: BatchedDataDict) -> torch.Tensor:
        result = torch.zeros(shard["input_ids"].shape, dtype=torch.float32)
        keys = [key for key in ("input_ids", "input_lengths", ROUTED_EXPERTS) if key in shard]
        if "logprob_mask" in shard:
            shard = shard.copy()
            shard["token_mask"] = shard["logprob_mask"]
            keys.append("token_mask")
        parts = self._microbatches(shard, keys)
        join_microbatches(zip(forward.logprobs(parts)), result)
        complete: torch.Tensor = self._on_all_ranks(result)
        return complete

    @borrows(Part.WEIGHTS)
    def publish_weights(self, version: int, dtype: str) -> WeightUpdate | None:
        """Publish the current weights from rank 0, which returns what receivers need; other ranks return None."""
        return self._publish(self._state.served_weights(), version, dtype)

    def _publish(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int, dtype: str | None
    ) -> WeightUpdate | None:
        """Publish tensors, which are gathered by all ranks, from rank 0; see `WeightSender.publish`."""
        if self._group.rank == 0:
            return self._sender.publish(tensors, version=version, dtype=dtype)
        _exhaust(tensors)
        return None

    def weight_endpoint(self, host: str | None) -> Endpoint:
        """Return the address at which this rank serves streams, and their key. See `WeightStreamer.endpoint`."""
        return self._streamer.endpoint(host)

    @borrows(Part.WEIGHTS)
    def send_weights(self, version: int, dtype: str, stream: int, receivers: list[list[int]]) -> str | None:
        """Send the current weights to `receivers[rank]`; returns their digest, or None without receivers."""
        tensors = self._state.served_weights(on_all_ranks=any(receivers[1:]))
        mine = receivers[self._group.rank]
        if mine:
            return self._streamer.send(tensors, version=version, dtype=dtype, stream=stream, receivers=mine)
        _exhaust(tensors)
        return None

    @needs(Part.WEIGHTS, Part.OPTIMIZER)
    def save_checkpoint(self, directory: str | Path) -> None:
        """Write a checkpoint into `directory` (rank 0 writes all of it). See `policy_checkpoint`."""
        tokenizer_name = self._config.tokenizer_name or self._config.model_name
        policy_checkpoint.save(Path(directory), self._state, self._group, tokenizer_name)

    @needs(Part.WEIGHTS, Part.OPTIMIZER)
    def load_checkpoint(self, directory: str | Path) -> None:
        """Restore what `save_checkpoint` wrote, under any layout and backend.

        Raises:
            CheckpointError: it does not fit this policy.
        """
        policy_checkpoint.load(Path(directory), self._state, self._group)

    def _describe_model(self) -> tuple[str, int]:
        return type(self._state.module).__name__, sum(shape.numel() for shape in self._state.shapes.values())


def _exhaust(tensors: Iterable[Any]) -> None:
    """Take part in gathering tensors that other ranks use."""
    for _ in tensors:
        pass
