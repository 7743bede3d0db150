"""The teacher's worker: a frozen Hugging Face model, replicated or sharded (FSDP2), without optimizer."""

from __future__ import annotations

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.logprob_forward import LogprobForward
from nemo_rl.models.policy.model_worker_base import ModelWorker, join_microbatches
from nemo_rl.models.policy.offload import Part, PolicyMemory, StoredTensors, borrows
from nemo_rl.models.policy.parallel_model import load_parallel_model
from nemo_rl.models.policy.row_parts import threads_for
from nemo_rl.utils.garbage import freeze_modules, gc_paused

_KEYS = ("input_ids", "input_lengths", "token_mask")


class TorchTeacherWorker(ModelWorker):
    """Computes log-probabilities of its shard of every batch under a frozen model.

    Once `offload` has been called, the weights are on the device only during a call.

    Args:
        config: the section that `TeacherConfig.as_policy` returns, with a model that is not embedded.
        num_local_workers: see `ModelWorker`.
        device_type: see `ModelWorker`.

    Raises:
        ModelError: the model cannot be loaded, or does not fit the configuration.
    """

    @gc_paused()
    def __init__(
        self, config: PolicyConfig, *, num_local_workers: int | None = None, device_type: str | None = None
    ) -> None:
        super().__init__(config, seed=0, num_local_workers=num_local_workers, device_type=device_type)
        self._model = model = load_parallel_model(config, self._group, trained=False)
        self._forward = LogprobForward(
            model,
            packed=config.batching.mode == "packed",
            temperature=config.generation.temperature,
            threads=threads_for(model, self._num_threads),
        )
        self._memory = PolicyMemory(model.device)
        weights = StoredTensors(lambda: model.parameters().values(), model.device, constant=True)
        self._memory.add(Part.WEIGHTS, weights)
        self._memory.guard(model.module, Part.WEIGHTS)
        freeze_modules()

    @property
    def _needs_collectives(self) -> bool:
        return self._config.sharding == "fsdp"

    def _describe_model(self) -> tuple[str, int]:
        return type(self._model.module).__name__, sum(value.numel() for value in self._model.parameters().values())

    @borrows(Part.WEIGHTS)
    def get_logprobs(self, shard: BatchedDataDict) -> torch.Tensor:
        """Return the log-probabilities of this rank's rows, [b, T] float32 on the CPU, in the shard's order."""
        result = torch.zeros(shard["input_ids"].shape)
        join_microbatches(zip(self._forward.logprobs(self._microbatches(shard, _KEYS))), result)
        return result

    @borrows(Part.WEIGHTS)
    def get_top_logprobs(self, shard: BatchedDataDict, k: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and log-probabilities of this rank's rows on the CPU; see `LogprobForward.top_logprobs`."""
        shape = shard["input_ids"].shape
        results = torch.zeros(*shape, k, dtype=torch.int32), torch.zeros(*shape, k + 1)
        join_microbatches(self._forward.top_logprobs(self._microbatches(shard, _KEYS), k, num_tokens), *results)
        return results
