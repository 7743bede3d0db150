"""Training of a reward model: a model with a score per conversation learns which of two answers is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_rl.algorithms.preference_losses import BradleyTerryLoss
from nemo_rl.algorithms.record_training import RecordTraining
from nemo_rl.algorithms.reward_model_config import RewardModelJobConfig

if TYPE_CHECKING:
    import torch

    from nemo_rl.distributed.batched_data_dict import BatchedDataDict


@dataclass
class RewardModelTraining(RecordTraining[RewardModelJobConfig]):
    """Runs the training loop of a reward model; see `RecordTraining`."""

    def _loss(self) -> BradleyTerryLoss:
        return BradleyTerryLoss(self.config.reward_model)

    def _outputs(self, batch: BatchedDataDict) -> torch.Tensor:
        return self.policy.get_scores(batch)

    def _batch_metrics(self, batch: BatchedDataDict) -> dict[str, float]:
        return {}  # the loss is on conversations
