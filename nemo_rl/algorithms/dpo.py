"""Direct preference optimization: a policy learns to prefer the better of two answers, without generating any.

The reference policy is the policy with its initial weights. Its log-probabilities of the answers are computed before
the first step, when it is the policy itself, so no second model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.algorithms.preference_losses import DPOLoss
from nemo_rl.algorithms.record_training import RecordTraining
from nemo_rl.algorithms.training_loop import checkpoint_remedies
from nemo_rl.data.problem import Role
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import CheckpointError

if TYPE_CHECKING:
    from nemo_rl.algorithms.reference_logprobs import ReferenceLogprobs
    from nemo_rl.utils.checkpoint import Checkpoint

_REFERENCE = "reference_model"


def check_reference_model(checkpoint: Checkpoint, digest: str) -> None:
    """Raise `CheckpointError` if a checkpoint was trained with another reference policy than the model of `digest`."""
    with checkpoint_remedies(checkpoint):
        if checkpoint.state().get(_REFERENCE) != digest:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} was trained with another reference policy: the weights of "
                "policy.model_name have changed since the run began"
            )


@dataclass
class DPO(RecordTraining[DPOJobConfig]):
    """Runs the training loop of direct preference optimization; see `RecordTraining`.

    Attributes:
        references: the reference policy's log-probabilities of the train data, and of the validation data if any.
        reference_model: digest of the reference policy's weights.
    """

    references: Mapping[Role, ReferenceLogprobs] = field(default_factory=dict)
    reference_model: str = ""

    def run(self) -> str:
        """Train until a limit is reached; return the reason for the end as a short phrase."""
        training = self.config.training
        steps_left = None if training.max_num_steps is None else max(training.max_num_steps - self.step, 0)
        upcoming = self.loader.upcoming(None if steps_left is None else steps_left * training.num_records_per_step)
        positions = {"train": upcoming}
        if self.validation is not None:
            positions["validation"] = self.validation["position"][::2].unique().tolist()
        policy = self.policy
        logprobs = policy.get_logprobs if self.step == 0 else policy.get_reference_policy_logprobs
        for role, reference in self.references.items():
            reference.complete(positions[role], logprobs)
        return super().run()

    def _loss(self) -> DPOLoss:
        return DPOLoss(self.config.dpo)

    def _prepare(self, batch: BatchedDataDict, role: Role) -> BatchedDataDict:
        prepared = batch.copy()
        prepared["reference_logprobs"] = self.references[role].of(batch)
        return prepared

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), _REFERENCE: self.reference_model}
