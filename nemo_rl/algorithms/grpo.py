"""Group relative policy optimisation (Shao et al. 2024, "DeepSeekMath", section 4.1).

Several completions are sampled for each problem. The advantage of a completion, which the policy gradient weights its
tokens with, is its reward compared with those of its group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nemo_rl.algorithms.advantages import at_turns, compute_advantages, overlong_penalties, turn_advantages
from nemo_rl.algorithms.branches import TrainingRows
from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.loss_functions import ClippedPGLoss, kl_estimates
from nemo_rl.algorithms.on_policy import OnPolicyLoop
from nemo_rl.algorithms.rollouts import Rollout
from nemo_rl.errors import ConfigError

if TYPE_CHECKING:
    from nemo_rl.models.policy.interfaces import LossFunction


class GRPO(OnPolicyLoop):
    """Runs the GRPO training loop.

    Example::

        grpo = GRPO(config=config, policy=policy, generation=generation, environment=environment, loader=loader,
                    validation=None, recorder=recorder, checkpoints=None, pad_token_id=tokenizer.pad_token_id)
        reason = grpo.run()

    Attributes: see `OnPolicyLoop`.
    """

    config: MasterConfig

    def _add_signal(self, rollout: Rollout, rows: TrainingRows) -> None:
        rows.batch["advantages"] = self._advantages(rollout, rows)

    def _loss_function(self) -> LossFunction:
        return ClippedPGLoss(self.config.resolved_loss)

    def _advantages(self, rollout: Rollout, rows: TrainingRows) -> torch.Tensor:
        """Compute the advantages of the rows: [R], or [R, T] with KL "reward_to_go" or one for each turn."""
        config, batch, samples = self.config, rows.batch, rows.samples
        groups, sample_mask = rollout.batch["group"], rollout.batch["sample_mask"]
        if rows.turn_index is not None and config.grpo.advantage.level == "turn":
            turns = rollout.batch["turn_rewards"], rollout.batch["num_turns"]
            advantages = turn_advantages(*turns, groups, config.grpo.advantage, sample_mask)
            return at_turns(advantages[samples], rows.turn_index)
        rewards, token_penalties = rollout.rewards, None
        if (penalty := config.grpo.overlong_penalty) is not None:
            limit = config.policy.generation.max_new_tokens
            buffer = penalty.buffer_tokens or max(limit // 5, 1)
            rewards = rewards + overlong_penalties(rollout.num_completion_tokens, limit, buffer, penalty.factor)
        if config.loss.has_kl_in_reward:
            log_ratio = batch["prev_logprobs"] - batch["reference_policy_logprobs"]
            kl = config.loss.kl_coef * kl_estimates(log_ratio, config.loss.kl_estimator)
            kl = torch.where(batch["token_mask"] > 0, kl, 0.0)
            if config.loss.kl_placement == "reward":
                rewards = rewards - torch.zeros_like(rewards).index_add(0, samples, kl.sum(dim=1))
            elif rollout.branches is None:
                token_penalties = kl
            else:
                raise ConfigError(
                    "loss.kl_placement=reward_to_go needs episodes with one transcript, but an agent has left "
                    "several in one episode; set loss.kl_placement=reward"
                )
        advantages = compute_advantages(
            rewards,
            groups,
            config.grpo.advantage,
            sample_mask,
            token_penalties=token_penalties,
            token_mask=batch["token_mask"],
        )
        return advantages[samples]
