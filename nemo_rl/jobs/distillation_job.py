"""Runs a job for on-policy distillation: that of `on_policy_job` with a teacher as a further worker group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.jobs.attempt import WorkerGroup
from nemo_rl.jobs.command_line import JobArguments, run_command
from nemo_rl.jobs.model_files import ensure_model
from nemo_rl.jobs.on_policy_job import OnPolicyAttempt
from nemo_rl.jobs.teacher_files import check_teacher, num_tokens, with_resolved_teacher
from nemo_rl.jobs.training_job import run_training

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nemo_rl.algorithms.on_policy import OnPolicyLoop
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.jobs.model_files import ModelFiles
    from nemo_rl.jobs.on_policy_job import OnPolicyInputs


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command line of distillation and return its exit code; see `run_command`."""
    return run_command(DistillationJobConfig, "distillation_embedded", run_distillation, argv, program=program)


def run_distillation(arguments: JobArguments[DistillationJobConfig]) -> None:
    """Run a distillation job, or print its plan with `--dry-run`."""
    config = with_resolved_teacher(arguments.config)
    run_training(_DistillationAttempt, dataclasses.replace(arguments, config=config))


class _DistillationAttempt(OnPolicyAttempt[DistillationJobConfig]):
    """Runs distillation: checks and starts the teacher, too."""

    def _check_others(self, model: ModelFiles) -> None:
        check_teacher(self.config, model.tokenizer)

    def _create_models(self, checked: Future[OnPolicyInputs]) -> str:
        student = super()._create_models(checked)
        self.attempt.create_model(self.config.teacher.as_policy(self.config.policy), checked)
        return student

    def _start_others(self, cluster: RayVirtualCluster, inputs: OnPolicyInputs) -> dict[str, WorkerGroup]:
        from nemo_rl.models.teacher.teacher import Teacher

        config, attempt = self.config, self.attempt
        part = config.teacher.cluster
        teacher = Teacher(
            cluster if part is None else attempt.make_cluster(part, "teacher"),
            config.teacher,
            config.policy,
            ensure_model(config.teacher.as_policy(config.policy)),
            num_tokens=num_tokens(inputs.model.tokenizer),
        )
        attempt.stack.callback(teacher.shutdown)
        return {"teacher": teacher}

    def _make_loop(self, others: dict[str, WorkerGroup], **parts: Any) -> OnPolicyLoop:
        from nemo_rl.algorithms.distillation import Distillation
        from nemo_rl.models.teacher.teacher import Teacher

        teacher = others["teacher"]
        assert isinstance(teacher, Teacher)
        if self.config.teacher_shares_gpus:
            teacher.offload()
        return Distillation(teacher=teacher, **parts)
