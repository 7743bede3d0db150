"""Runs a GRPO job: the loop of `nemo_rl.algorithms.grpo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.jobs.attempt import WorkerGroup
from nemo_rl.jobs.command_line import JobArguments, run_command
from nemo_rl.jobs.on_policy_job import OnPolicyAttempt
from nemo_rl.jobs.training_job import run_training

if TYPE_CHECKING:
    from nemo_rl.algorithms.on_policy import OnPolicyLoop


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the GRPO command line and return its exit code; see `run_command`."""
    return run_command(MasterConfig, "grpo_math_embedded", run_grpo, argv, program=program)


def run_grpo(arguments: JobArguments[MasterConfig]) -> None:
    """Run a GRPO job, or print its plan with `--dry-run`."""
    run_training(GRPOAttempt, arguments)


class GRPOAttempt(OnPolicyAttempt[MasterConfig]):
    """Runs GRPO."""

    def _make_loop(self, others: dict[str, WorkerGroup], **parts: Any) -> OnPolicyLoop:
        from nemo_rl.algorithms.grpo import GRPO

        return GRPO(**parts)
