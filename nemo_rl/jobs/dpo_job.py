"""Runs a job for direct preference optimization: the loop of `nemo_rl.algorithms.dpo`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import xxhash

from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.jobs.attempt import INPUTS_THREAD
from nemo_rl.jobs.command_line import JobArguments, run_command
from nemo_rl.jobs.model_files import model_digest
from nemo_rl.jobs.preference_job import PreferenceAttempt
from nemo_rl.jobs.record_job import RecordInputs
from nemo_rl.jobs.training_job import run_training

if TYPE_CHECKING:
    from nemo_rl.algorithms.dpo import DPO
    from nemo_rl.utils.checkpoint import Checkpoint

# Files of a run with the reference policy's log-probabilities, by the role of the data.
REFERENCE_FILE = "reference_{}.safetensors"
# Keys of the section `policy` that change no log-probability of the reference policy.
_OTHER_KEYS = {"optimizer", "scheduler", "max_grad_norm", "generation", "lora", "train_micro_batch_size"}


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command line of direct preference optimization and return its exit code; see `run_command`."""
    return run_command(DPOJobConfig, "dpo_embedded", run_dpo, argv, program=program)


def run_dpo(arguments: JobArguments[DPOJobConfig]) -> None:
    """Run a job for direct preference optimization, or print its plan with `--dry-run`."""
    run_training(DPOAttempt, arguments)


@dataclass(frozen=True)
class DPOAttempt(PreferenceAttempt[DPOJobConfig]):
    """Trains with the reference policy's log-probabilities, which the run directory keeps."""

    def prepare_inputs(self, checkpoint: Checkpoint | None) -> RecordInputs:
        inputs = super().prepare_inputs(checkpoint)
        with self.attempt.timeline.phase("reference", INPUTS_THREAD):
            from nemo_rl.algorithms.dpo import check_reference_model
            from nemo_rl.algorithms.reference_logprobs import ReferenceLogprobs

            model = model_digest(self.config.policy)
            if checkpoint is not None:
                check_reference_model(checkpoint, model)
            options = [self.config.policy.model_dump(mode="json", exclude=_OTHER_KEYS), self.config.num_shards]
            references = {
                role: ReferenceLogprobs(
                    self.attempt.run.path / REFERENCE_FILE.format(role),
                    xxhash.xxh3_128_hexdigest(json.dumps([model, pairs.digest, options]).encode()),
                    pairs,
                    inputs.collate,
                )
                for role, pairs in inputs.records.items()
            }
        return replace(inputs, loop_options={"references": references, "reference_model": model})

    @staticmethod
    def loop_class() -> type[DPO]:
        from nemo_rl.algorithms.dpo import DPO

        return DPO
