"""On-policy distillation: a student samples, and learns the next-token distributions of a teacher at its own samples.

::

    problems ──► generation ──completions──► environment ──► rewards, which are only measured
                     ▲                │
                     │                └────► teacher ──log-probabilities──┐
                     │                                                    ▼
                     └──── weights, digest checked ──── student ◄── training batch

Agarwal et al. (2023), "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD),
arXiv:2306.13649. The loop is that of GRPO with another signal; `distillation_losses` has the objectives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.algorithms.distillation_losses import SampledTokensLoss, TopTokensLoss
from nemo_rl.algorithms.on_policy import OnPolicyLoop

if TYPE_CHECKING:
    from nemo_rl.algorithms.branches import TrainingRows
    from nemo_rl.algorithms.rollouts import Rollout
    from nemo_rl.models.policy.interfaces import LossFunction
    from nemo_rl.models.teacher.interfaces import TeacherInterface


@dataclass
class Distillation(OnPolicyLoop):
    """Runs the training loop of on-policy distillation. `policy` is the student.

    Attributes:
        teacher: scores the tokens that the student has sampled.
    """

    config: DistillationJobConfig
    teacher: TeacherInterface = field(kw_only=True)

    def _needs_prev_logprobs(self, num_parts: int) -> bool:
        return self.config.distillation.objective == "sampled" and super()._needs_prev_logprobs(num_parts)

    def _add_signal(self, rollout: Rollout, rows: TrainingRows) -> None:
        config, batch = self.config.distillation, rows.batch
        with self.timer.phase("teacher"):
            if config.objective == "top_k":
                batch["top_ids"], batch["teacher_top_logprobs"] = self.teacher.get_top_logprobs(batch, config.top_k)
            else:
                batch["teacher_logprobs"] = self.teacher.get_logprobs(batch)

    def _loss_function(self) -> LossFunction:
        config = self.config
        if config.distillation.objective == "top_k":
            return TopTokensLoss(config.distillation.beta)
        return SampledTokensLoss(config.resolved_loss)
