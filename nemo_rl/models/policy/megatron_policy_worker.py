"""One rank of a policy that megatron-core trains: a stage of the model, a share of its matrices, a share of the data.

Per optimizer step, on every rank::

    shard of a global batch ─► micro-batches ─► megatron-core's pipeline schedule ─► finalize_model_grads ─► clip, AdamW
                                                 (losses and metrics on the last stage)    (sums over ranks)

The same methods as `TorchPolicyWorker`, and like it without Ray as well: processes with `RANK`, `WORLD_SIZE`,
`MASTER_ADDR` and `MASTER_PORT` set. All methods but `attestation` and `shutdown` are collectives. Ranks that differ in
anything but their data-parallel index must be given the same shard.
"""

from __future__ import annotations

from nemo_rl.models.policy.megatron import expected_warnings  # noqa: F401 - megatron-core warns while it is imported

# isort: split
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core
import torch
from transformers import PreTrainedModel

from nemo_rl import settings
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ConfigError
from nemo_rl.models import onednn
from nemo_rl.models.policy import policy_checkpoint
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.hf_loading import empty_model, load_config, load_model
from nemo_rl.models.policy.interfaces import LossFunction, TrainResult
from nemo_rl.models.policy.megatron.config import MegatronOptions
from nemo_rl.models.policy.megatron.cpu import adapt_to_cpu
from nemo_rl.models.policy.megatron.families import find_family
from nemo_rl.models.policy.megatron.forward import PipelineForward
from nemo_rl.models.policy.megatron.model import PolicyModel, build_model, wrap_for_training
from nemo_rl.models.policy.megatron.model_check import check_model
from nemo_rl.models.policy.megatron.optimizer import MegatronOptimizer
from nemo_rl.models.policy.megatron.parallel import leave_grid, make_grid
from nemo_rl.models.policy.megatron.state import MegatronState
from nemo_rl.models.policy.megatron.weights import WeightExchange
from nemo_rl.models.policy.metric_sums import MetricSums
from nemo_rl.models.policy.microbatching import microbatches
from nemo_rl.models.policy.offload import Part, PolicyMemory, Scratch, StoredTensors, borrows, needs
from nemo_rl.models.policy.process_group import join_process_group
from nemo_rl.models.policy.registry import policy_backend
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


class MegatronPolicyWorker:
    """Trains a Hugging Face causal language model of a known family with megatron-core.

    Args:
        config: `model_name` must be a directory or hub name, `options` a `MegatronOptions`.
        total_steps: optimizer steps of the whole run, for schedules without a `total_steps` of their own.
        seed: of the run.
        num_local_workers: workers on this node, which share its CPUs; None takes `WORLD_SIZE`.
        device_type: "cuda", "cpu", or None for a GPU where there is one.
        weight_transport: of weights that are published: a name in `nemo_rl.models.weights.transports.TRANSPORTS`.
        weight_stream_transport: of those that are streamed.

    Raises:
        ConfigError: the options are not this backend's, or do not fit the number of workers.
        ModelError: the model cannot be loaded, is of an unknown family, or cannot be divided as the options say.
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
        options = config.options
        if not isinstance(options, MegatronOptions):
            raise ConfigError(f"policy.options is a {type(options).__name__}: set policy.backend=megatron")
        options.layout(settings.WORLD_SIZE.get())  # refuses a number of workers that does not divide
        self._hf = load_config(config.model_name, config.attn_implementation)
        check_model(self._hf, config, options)
        self._family = find_family(self._hf.model_type)
        # For processes without Ray; its workers have them from the start.
        settings.export(policy_backend(config.backend).gpu_env_vars)
        self._config = config
        self._options = options
        self._sender = WeightSender(weight_transport, config.weight_bucket_mib << 20)
        self._streamer = WeightStreamer(weight_stream_transport, config.weight_stream_bucket_bytes)
        world = join_process_group(device_type=device_type, needs_collectives=True)
        if world.device.type == "cpu":
            adapt_to_cpu()
        onednn.warn_if_emulated(world.device.type, getattr(torch, config.precision))
        prepare_process(world, config.num_threads, num_local_workers, seed)
        self._grid = make_grid(world, options)
        self._skeleton = empty_model(self._hf)
        self._reference: PipelineForward | None = None
        self._build(total_steps)

    def _build(self, total_steps: int) -> None:
        config, options = self._config, self._options
        model = build_model(self._hf, self._family, config, options, self._grid, trained=True)
        exchange = self._exchange(model)
        wrapped = wrap_for_training(model, options)
        self._optimizer = MegatronOptimizer(wrapped, config, options, total_steps=total_steps)
        self._state = MegatronState(
            self._skeleton,
            exchange,
            self._optimizer,
            dtype=model.config.params_dtype,
            distributed_optimizer=options.distributed_optimizer,
        )
        loaded = self._load_on_rank_0()
        self._state.load_weights(None if loaded is None else _reader(loaded))
        if loaded is not None:
            self._skeleton.generation_config = loaded.generation_config
        self._forward = self._pipeline(wrapped)
        self._memory = self._take_charge(model)

    def _take_charge(self, model: PolicyModel) -> PolicyMemory:
        device, optimizer = self._grid.world.device, self._optimizer
        memory = PolicyMemory(device)
        memory.add(Part.WEIGHTS, StoredTensors(model.parameters, device))
        memory.add(Part.GRADIENTS, Scratch(optimizer.release_gradients, optimizer.regain_gradients))
        memory.add(Part.OPTIMIZER, StoredTensors(optimizer.state_tensors, device))
        memory.guard(model, Part.WEIGHTS)
        return memory

    def _exchange(self, model: PolicyModel) -> WeightExchange:
        shapes = {name: parameter.shape for name, parameter in self._skeleton.named_parameters()}
        return WeightExchange(model, self._hf, self._family, shapes, self._grid)

    def _pipeline(self, model: Any) -> PipelineForward:
        packed = self._config.batching.mode == "packed"
        return PipelineForward(model, self._grid, self._options, self._hf.vocab_size, packed=packed)

    def _load_on_rank_0(self) -> PreTrainedModel | None:
        """Only rank 0 reads the weights, into its main memory."""
        return load_model(self._config.model_name, self._hf) if self._grid.world.rank == 0 else None

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
        counts = count_globally(batch, self._grid.data, self._grid.world.device)
        sums = MetricSums()

        def judge(logprobs: torch.Tensor, part: BatchedDataDict) -> tuple[torch.Tensor, None]:
            loss, metrics = loss_fn(logprobs, part, counts.num_tokens, counts.num_samples)
            sums.add({"loss": loss.detach(), **metrics})
            return loss, None

        config = self._config
        self._optimizer.zero_grad()
        parts = list(microbatches(batch, config.train_micro_batch_size, config.batching.length_multiple))
        self._forward.train(parts, judge)
        reduced: dict[str, float] = sums.reduced(self._grid.data) if self._grid.is_last_stage else {}
        reduced = self._grid.from_last_stage(reduced)
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
            model = build_model(self._hf, self._family, self._config, self._options, self._grid, trained=False)
            loaded = self._load_on_rank_0()
            with torch.no_grad():
                self._exchange(model).scatter(
                    None if loaded is None else _reader(loaded), lambda parameter, value: parameter.copy_(value)
                )
            self._reference = self._pipeline(model)
            self._memory.add(Part.REFERENCE, StoredTensors(model.parameters, self._grid.world.device, constant=True))
            self._memory.guard(model, Part.REFERENCE)
            freeze_modules()
        return self._logprobs(self._reference, shard)

    def _logprobs(self, forward: PipelineForward, shard: BatchedDataDict) -> torch.Tensor:
        result = logprobs_by_row(shard, self._config, lambda parts: forward.logprobs(list(parts)))
        complete: torch.Tensor = self._grid.from_last_stage(result)
        return complete

    @borrows(Part.WEIGHTS)
    def publish_weights(self, version: int, dtype: str) -> WeightUpdate | None:
        """Publish the current weights from rank 0, which returns what receivers need; other ranks return None."""
        publish = partial(self._sender.publish, version=version, dtype=dtype)
        return hand_over(self._state.served_weights(), publish if self._grid.world.rank == 0 else None)

    def weight_endpoint(self, host: str | None) -> tuple[str | tuple[str, int], bytes]:
        """Where receivers ask this rank for streams, and the key that lets them in. See `WeightStreamer.endpoint`."""
        return self._streamer.endpoint(host)

    @borrows(Part.WEIGHTS)
    def send_weights(self, version: int, dtype: str, stream: int, receivers: list[list[int]]) -> str | None:
        """Send the current weights to `receivers[rank]`; returns their digest, or None when there are none."""
        own = receivers[self._grid.world.rank]
        send = partial(self._streamer.send, version=version, dtype=dtype, stream=stream, receivers=own)
        return hand_over(self._state.served_weights(on_all_ranks=any(receivers[1:])), send if own else None)

    @needs(Part.WEIGHTS, Part.OPTIMIZER)
    def save_checkpoint(self, directory: str | Path) -> None:
        """Write the checkpoint into `directory` (rank 0 writes all of it). See `policy_checkpoint`."""
        tokenizer_name = self._config.tokenizer_name or self._config.model_name
        policy_checkpoint.save(Path(directory), self._state, self._grid.world, tokenizer_name)

    @needs(Part.WEIGHTS, Part.OPTIMIZER)
    def load_checkpoint(self, directory: str | Path) -> None:
        """Restore what `save_checkpoint` wrote, under whatever layout and backend.

        Raises:
            CheckpointError: it does not fit.
        """
        policy_checkpoint.load(Path(directory), self._state, self._grid.world)

    def offload(self, keep_weights: bool = False) -> None:
        """Make room on the device: gradients are dropped, optimizer state and weights (unless kept) go to the host.

        Every other method brings back what it needs.

        Raises:
            TrainingError: the host has not enough memory.
        """
        self._memory.offload(keep_weights=keep_weights)

    def attestation(self) -> dict[str, Any]:
        """What this worker runs on and with."""
        grid = self._grid
        return {
            **stack(grid.world),
            "megatron_core": megatron.core.__version__,
            "model": type(self._skeleton).__name__,
            "num_parameters": sum(parameter.numel() for parameter in self._skeleton.parameters()),
            "tensor_rank": grid.tensor.rank(),
            "context_rank": grid.context.rank(),
            "data_rank": grid.data.rank,
            "pipeline_stage": grid.stage,
        }

    def shutdown(self) -> None:
        """Leave the process group. Idempotent."""
        leave_grid()


def _reader(model: PreTrainedModel) -> Any:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters.__getitem__
