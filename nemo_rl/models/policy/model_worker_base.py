"""The base class of workers that hold a model and compute log-probabilities: policy workers and teachers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import transformers

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models import onednn
from nemo_rl.models.policy.allocator import keep_freed_memory
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.microbatching import microbatches
from nemo_rl.models.policy.offload import PolicyMemory
from nemo_rl.models.policy.process_group import join_process_group, seed_everything
from nemo_rl.models.worker_process import process_facts, take_cpu_share


class ModelWorker(ABC):
    """Holds a model, or a rank's part of it, in one process of a process group.

    Args:
        config: the model, its precision, its sharding and its batches.
        seed: seed of the process's generators.
        num_local_workers: workers on this node, which share its CPUs; None takes `WORLD_SIZE`.
        device_type: "cuda", "cpu", or None for a GPU if there is one.

    Raises:
        ConfigError: the configuration does not fit the backend or the number of workers.
        WorkerError: the process group cannot be initialized, or there is no GPU.
    """

    _memory: PolicyMemory  # what `offload` moves; a subclass creates it with its model

    def __init__(
        self, config: PolicyConfig, *, seed: int, num_local_workers: int | None, device_type: str | None
    ) -> None:
        self._config = config
        self._check_config()
        self._group = join_process_group(device_type=device_type, needs_collectives=self._needs_collectives)
        self._prepare_process(num_local_workers or self._group.world_size, seed)

    def _check_config(self) -> None:  # noqa: B027 - optional
        """Raise for a configuration that this backend does not support, before the ranks meet."""

    @property
    @abstractmethod
    def _needs_collectives(self) -> bool:
        """Whether the backend needs an initialized `torch.distributed` even for a single process."""

    @abstractmethod
    def _describe_model(self) -> tuple[str, int]:
        """Return the name of the model's class and its number of parameters over all ranks."""

    def _prepare_process(self, num_local_workers: int, seed: int) -> None:
        """Take this worker's share of the node's CPUs, seed the generators, keep progress bars out of the log."""
        if self._group.device.type == "cpu":
            take_cpu_share(self._config.num_threads, num_local_workers)
            keep_freed_memory()
            # Moments of weights with almost no gradient become denormal numbers, which make AdamW 20 times slower.
            # Threads inherit this setting from the thread that starts them, so it precedes the first computation.
            torch.set_flush_denormal(True)
        self._num_threads = torch.get_num_threads()
        onednn.warn_if_emulated(self._group.device.type, getattr(torch, self._config.precision))
        seed_everything(seed, self._group.rank)
        transformers.utils.logging.disable_progress_bar()

    def _microbatches(self, shard: BatchedDataDict, keys: Iterable[str]) -> Iterable[BatchedDataDict]:
        """Return the micro-batches of these keys of a shard for a pass without gradient."""
        inputs = BatchedDataDict({key: shard[key] for key in keys})
        inputs.microbatch_plan = shard.microbatch_plan
        return microbatches(inputs, self._config.logprob_batch_size, self._config.batching.length_multiple)

    def offload(self, keep_weights: bool = False) -> None:
        """Free the device's memory: drop gradients, move optimizer state and weights (unless kept) to the host.

        Every other method brings back what it needs.

        Raises:
            TrainingError: the host has not enough memory.
        """
        self._memory.offload(keep_weights=keep_weights)

    def attestation(self) -> dict[str, Any]:
        """Describe this worker: its process, its software, its device and its model."""
        device = self._group.device
        model, num_parameters = self._describe_model()
        return {
            **process_facts(),
            "num_threads": self._num_threads,
            "rank": self._group.rank,
            "world_size": self._group.world_size,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "model": model,
            "num_parameters": num_parameters,
        }

    def shutdown(self) -> None:
        """Leave the process group. Idempotent."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join_microbatches(results: Iterable[Sequence[torch.Tensor]], *targets: torch.Tensor) -> None:
    """Copy the results of successive micro-batches, which may be narrower, into the rows of a shard.

    Args:
        results: for each micro-batch, one tensor [b, t, ...] per target.
        targets: [B, T, ...].
    """
    row = 0
    for parts in results:
        for target, part in zip(targets, parts, strict=True):
            rows, width = part.shape[:2]
            target[row : row + rows, :width] = part.to("cpu")
        row += rows
