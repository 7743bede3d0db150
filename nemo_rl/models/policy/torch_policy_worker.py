"""The policy worker that trains with plain PyTorch: replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy.logprob_forward import LogprobForward
from nemo_rl.models.policy.offload import Part, Scratch, borrows, needs
from nemo_rl.models.policy.optimizer import PolicyOptimizer
from nemo_rl.models.policy.parallel_model import ParallelModel, load_parallel_model
from nemo_rl.models.policy.policy_checkpoint import TorchState
from nemo_rl.models.policy.row_parts import threads_for
from nemo_rl.models.policy.score_forward import ScoreForward
from nemo_rl.models.policy.worker_base import PolicyForward, PolicyWorker
from nemo_rl.models.weights.adapters import with_base
from nemo_rl.models.weights.digest import dtype_by_name
from nemo_rl.models.weights.interfaces import BaseWeights, WeightUpdate


class TorchPolicyWorker(PolicyWorker):
    """Trains a Hugging Face causal language model with PyTorch; see `PolicyWorker` for arguments and errors.

    With `RewardPolicyConfig` it trains a reward model instead, which has `get_scores` and no log-probabilities.
    """

    @property
    def _needs_collectives(self) -> bool:
        return self._config.sharding == "fsdp"

    def _build(self, total_steps: int) -> None:
        config = self._config
        self._model = load_parallel_model(config, self._group, trained=True)
        self._threads = threads_for(self._model, self._num_threads)
        self._forward = self._forward_of(self._model)
        optimizer = PolicyOptimizer(
            self._model.parameters(),
            config.optimizer,
            config.scheduler,
            total_steps=total_steps,
            max_grad_norm=config.max_grad_norm,
        )
        self._optimizer = optimizer
        self._state = self._trained_state(optimizer)
        self._published_bases: dict[str, WeightUpdate | None] = {}  # of LoRA, by dtype
        self._memory = self._track_memory(
            self._model.module,
            lambda: self._model.parameters().values(),
            Scratch(release=self._optimizer.zero_grad),
        )

    def _trained_state(self, optimizer: PolicyOptimizer) -> TorchState:
        config = self._config
        if config.lora is None:
            return TorchState(self._model, optimizer)
        from nemo_rl.models.policy.lora_state import LoraState

        return LoraState(self._model, optimizer, config.lora, config.model_name)

    @borrows(Part.WEIGHTS)
    def publish_adapters(self, version: int, dtype: str) -> WeightUpdate | None:
        """Publish the adapters of LoRA, and at the first call for a dtype the base weights, which never change.

        Rank 0 returns what receivers need; other ranks return None.
        """
        from nemo_rl.models.policy.lora_state import LoraState

        state = self._state
        assert isinstance(state, LoraState), "the policy has no adapters"
        if dtype not in self._published_bases:
            self._published_bases[dtype] = self._publish(state.frozen_weights(dtype_by_name(dtype)), version, None)
        base, adapters = self._published_bases[dtype], self._publish(state.adapters(), version, "float32")
        if base is None or adapters is None:
            return None
        return with_base(adapters, BaseWeights(base.buckets, base.digest, dtype, state.changes))

    def _load_reference(self) -> PolicyForward:
        model = load_parallel_model(self._config, self._group, trained=False)
        forward = self._forward_of(model)
        self._track_reference(model.module, lambda: model.parameters().values())
        return forward

    @needs(Part.WEIGHTS)
    def get_scores(self, shard: BatchedDataDict) -> torch.Tensor:
        """Return the rewards of this rank's rows, [b] float32 on the CPU, in the shard's order."""
        assert isinstance(self._forward, ScoreForward), "the policy has no reward model"
        return torch.cat(
            [scores.cpu() for scores in self._forward.scores(self._microbatches(shard, ("input_ids", "input_lengths")))]
        )

    def _forward_of(self, model: ParallelModel) -> LogprobForward | ScoreForward:
        config = self._config
        packed = config.batching.mode == "packed"
        if config.is_reward_model:
            return ScoreForward(model, packed=packed)
        return LogprobForward(model, packed=packed, temperature=config.generation.temperature, threads=self._threads)
