"""One worker of a policy: a shard of the data, the model (or a shard of it), its optimizer.

Per optimizer step, on every rank::

    shard of a global batch ─► micro-batches ─► forward, loss, backward ─► sum of gradients over ranks ─► clip, AdamW
                                    └── gradients and metrics add up ──┘

Works without Ray as well: a process with `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` set is a worker, one
with none of them is the only one. All methods but `attestation` and `shutdown` are collectives: every rank calls them
in the same order.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy import policy_checkpoint
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.interfaces import LossFunction, TrainResult
from nemo_rl.models.policy.logprob_forward import LogprobForward
from nemo_rl.models.policy.metric_sums import MetricSums
from nemo_rl.models.policy.microbatching import microbatches
from nemo_rl.models.policy.offload import Part, PolicyMemory, Scratch, StoredTensors, borrows, needs
from nemo_rl.models.policy.optimizer import PolicyOptimizer
from nemo_rl.models.policy.parallel_model import ParallelModel, load_parallel_model
from nemo_rl.models.policy.process_group import join_process_group
from nemo_rl.models.policy.worker_process import prepare_process, stack
from nemo_rl.models.policy.worker_steps import (
    count_globally,
    hand_over,
    logprobs_by_row,
    train_on_global_batches,
)
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.models.weights.sender import WeightSender
from nemo_rl.models.weights.stream import WeightStreamer
from nemo_rl.models.worker_process import starts_without_collecting
from nemo_rl.utils.garbage import freeze_modules


class TorchPolicyWorker:
    """Trains a Hugging Face causal language model.

    Args:
        config: `model_name` must be a directory or hub name (`embedded` is the driver's to resolve).
        total_steps: optimizer steps of the whole run, for schedules without a `total_steps` of their own.
        seed: of the run.
        num_local_workers: workers on this node, which share its CPUs; None takes `WORLD_SIZE`.
        device_type: "cuda", "cpu", or None for a GPU where there is one.
        weight_transport: of weights that are published: a name in `nemo_rl.models.weights.transports.TRANSPORTS`.
        weight_stream_transport: of those that are streamed.

    Raises:
        ModelError: the model cannot be loaded, or does not fit the configuration.
        WorkerError: the ranks do not meet.
    """

    @starts_without_collecting
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
        self._config = config
        self._sender = WeightSender(weight_transport, config.weight_bucket_mib << 20)
        self._streamer = WeightStreamer(weight_stream_transport, config.weight_stream_bucket_bytes)
        self._group = join_process_group(device_type=device_type, needs_collectives=config.sharding == "fsdp")
        prepare_process(self._group, config.num_threads, num_local_workers, seed)
        self._model = load_parallel_model(config, self._group, trained=True)
        self._forward = LogprobForward(self._model, packed=config.batching.mode == "packed")
        self._reference: tuple[ParallelModel, LogprobForward] | None = None
        self._optimizer = PolicyOptimizer(
            self._model.parameters(),
            config.optimizer,
            config.scheduler,
            total_steps=total_steps,
            max_grad_norm=config.max_grad_norm,
        )
        self._state = policy_checkpoint.TorchState(self._model, self._optimizer)
        self._memory = self._take_charge()

    def _take_charge(self) -> PolicyMemory:
        device, memory = self._group.device, PolicyMemory(self._group.device)
        memory.add(Part.WEIGHTS, StoredTensors(lambda: self._model.parameters().values(), device))
        memory.add(Part.GRADIENTS, Scratch(release=self._optimizer.zero_grad))
        memory.add(Part.OPTIMIZER, StoredTensors(self._optimizer.state_tensors, device))
        memory.guard(self._model.module, Part.WEIGHTS)
        return memory

    @needs(Part.WEIGHTS, Part.GRADIENTS)
    def train(self, shard: BatchedDataDict, loss_fn: LossFunction, local_batch_size: int | None = None) -> TrainResult:
        """One optimizer step per `local_batch_size` rows of this rank's shard (None: one step for all of them).

        A shard with a plan of micro-batches knows its global batches; then `local_batch_size` is not used.

        Raises:
            NonFiniteError: on every rank; the weights are as before that optimizer step.
            DataError: rows that do not divide.
        """
        self._memory.expect(Part.OPTIMIZER)  # it comes while the gradients are computed
        return train_on_global_batches(shard, local_batch_size, lambda batch: self._train_step(batch, loss_fn))

    def _train_step(self, batch: BatchedDataDict, loss_fn: LossFunction) -> tuple[dict[str, float], int]:
        counts = count_globally(batch, self._group, self._group.device)
        sums = MetricSums()
        self._optimizer.zero_grad()  # what a loss function that raised may have left
        config = self._config
        for part in microbatches(batch, config.train_micro_batch_size, config.batching.length_multiple):
            part = part.to(self._group.device)
            logprobs = self._forward(part, only_loss_tokens=True)
            loss, metrics = loss_fn(logprobs, part, counts.num_tokens, counts.num_samples)
            loss.backward()
            sums.add({"loss": loss.detach(), **metrics})
        self._model.reduce_gradients()
        reduced = sums.reduced(self._group)
        reduced["lr"] = self._optimizer.lr
        self._memory.need(Part.OPTIMIZER)
        reduced["grad_norm"] = self._optimizer.step(reduced["loss"])
        return reduced, counts.num_forward_tokens

    @needs(Part.WEIGHTS)
    def get_logprobs(self, shard: BatchedDataDict) -> torch.Tensor:
        """Log-probabilities of this rank's rows, [b, T] float32 on the CPU, in the shard's order."""
        return self._logprobs(self._forward, shard)

    @borrows(Part.REFERENCE)
    def get_reference_policy_logprobs(self, shard: BatchedDataDict) -> torch.Tensor:
        """The same under the initial weights, which the first call loads from where they came from."""
        if self._reference is None:
            # Built exactly as the policy was, so that both agree to the last bit until the first step. A checkpoint
            # replaces the policy's weights only; these are never saved, as `model_name` keeps them.
            model = load_parallel_model(self._config, self._group, trained=False)
            self._reference = model, LogprobForward(model, packed=self._config.batching.mode == "packed")
            weights = StoredTensors(lambda: model.parameters().values(), self._group.device, constant=True)
            self._memory.add(Part.REFERENCE, weights)
            self._memory.guard(model.module, Part.REFERENCE)
            freeze_modules()
        return self._logprobs(self._reference[1], shard)

    def _logprobs(self, forward: LogprobForward, shard: BatchedDataDict) -> torch.Tensor:
        device = self._group.device
        with torch.no_grad():
            return logprobs_by_row(
                shard,
                self._config,
                lambda parts: (forward(part.to(device), only_loss_tokens=False) for part in parts),
            )

    @borrows(Part.WEIGHTS)
    def publish_weights(self, version: int, dtype: str) -> WeightUpdate | None:
        """Publish the current weights from rank 0, which returns what receivers need; other ranks return None."""
        publish = partial(self._sender.publish, version=version, dtype=dtype)
        return hand_over(self._model.full_tensors(), publish if self._group.rank == 0 else None)

    def weight_endpoint(self, host: str | None) -> tuple[str | tuple[str, int], bytes]:
        """Where receivers ask this rank for streams, and the key that lets them in. See `WeightStreamer.endpoint`."""
        return self._streamer.endpoint(host)

    @borrows(Part.WEIGHTS)
    def send_weights(self, version: int, dtype: str, stream: int, receivers: list[list[int]]) -> str | None:
        """Send the current weights to `receivers[rank]`; returns their digest, or None when there are none."""
        own = receivers[self._group.rank]
        send = partial(self._streamer.send, version=version, dtype=dtype, stream=stream, receivers=own)
        return hand_over(self._model.full_tensors(), send if own else None)

    @needs(Part.WEIGHTS, Part.OPTIMIZER)
    def save_checkpoint(self, directory: str | Path) -> None:
        """Write the checkpoint into `directory` (rank 0 writes all of it). See `policy_checkpoint`."""
        policy_checkpoint.save(Path(directory), self._state, self._group, self._tokenizer_name)

    @needs(Part.WEIGHTS, Part.OPTIMIZER)
    def load_checkpoint(self, directory: str | Path) -> None:
        """Restore what `save_checkpoint` wrote. Raises `CheckpointError` when it does not fit."""
        policy_checkpoint.load(Path(directory), self._state, self._group)

    def offload(self, keep_weights: bool = False) -> None:
        """Make room on the device: gradients are dropped, optimizer state and weights (unless kept) go to the host.

        Every other method brings back what it needs.

        Raises:
            TrainingError: the host has not enough memory.
        """
        self._memory.offload(keep_weights=keep_weights)

    @property
    def _tokenizer_name(self) -> str:
        return self._config.tokenizer_name or self._config.model_name

    def attestation(self) -> dict[str, Any]:
        """What this worker runs on and with."""
        return {
            **stack(self._group),
            "model": type(self._model.module).__name__,
            "num_parameters": sum(parameter.numel() for parameter in self._model.parameters().values()),
        }

    def shutdown(self) -> None:
        """Leave the process group. Idempotent."""
        if dist.is_initialized():
            dist.destroy_process_group()
