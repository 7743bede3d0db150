"""Runs a job that trains a reward model: the loop of `nemo_rl.algorithms.reward_model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_rl.algorithms.reward_model_config import RewardModelJobConfig
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.command_line import JobArguments, run_command
from nemo_rl.jobs.preference_job import PreferenceAttempt
from nemo_rl.jobs.record_job import RecordInputs
from nemo_rl.jobs.training_job import run_training

if TYPE_CHECKING:
    from nemo_rl.algorithms.reward_model import RewardModelTraining
    from nemo_rl.utils.checkpoint import Checkpoint


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command line of reward-model training and return its exit code; see `run_command`."""
    return run_command(RewardModelJobConfig, "reward_model_embedded", run_reward_model, argv, program=program)


def run_reward_model(arguments: JobArguments[RewardModelJobConfig]) -> None:
    """Run a job that trains a reward model, or print its plan with `--dry-run`."""
    run_training(RewardModelAttempt, arguments)


@dataclass(frozen=True)
class RewardModelAttempt(PreferenceAttempt[RewardModelJobConfig]):
    """Trains a model that transformers loads for sequence classification."""

    def prepare_inputs(self, checkpoint: Checkpoint | None) -> RecordInputs:
        inputs = super().prepare_inputs(checkpoint)
        for pairs in inputs.records.values():
            if inputs.pad_token_id in pairs.last_tokens():
                policy = self.config.policy
                raise ConfigError(
                    f"conversations end with the padding token of {policy.tokenizer_name or policy.model_name} "
                    f"({inputs.pad_token_id}), and transformers scores the token before padding; set "
                    "policy.tokenizer_name to a copy of the tokenizer with another pad_token"
                )
        return inputs

    @staticmethod
    def loop_class() -> type[RewardModelTraining]:
        from nemo_rl.algorithms.reward_model import RewardModelTraining

        return RewardModelTraining
