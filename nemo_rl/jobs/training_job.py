"""What all training jobs do around their loop: checks, run directory, evaluation in the background, report.

A job is a subclass of `TrainingAttempt`: `record_job` for training on records, `on_policy_job` for training on the
policy's own samples.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nemo_rl.jobs.attempt import Attempt, WorkerGroup, finish, open_attempt, print_dry_run
from nemo_rl.jobs.command_line import JobArguments
from nemo_rl.jobs.evaluation_part import EvaluationPart
from nemo_rl.jobs.job_config import JobConfig
from nemo_rl.jobs.model_files import check_model_name, check_weight_files
from nemo_rl.jobs.roles import Role, job_roles, role_plans
from nemo_rl.jobs.run_directory import open_run_directory
from nemo_rl.utils.checkpoint import CheckpointStore
from nemo_rl.utils.garbage import gc_paused

if TYPE_CHECKING:
    from nemo_rl.algorithms.training_loop import TrainingLoop
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.policy.policy import Policy
    from nemo_rl.utils.checkpoint import Checkpoint
    from nemo_rl.venvs import VenvPlan

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=JobConfig)
DataT = TypeVar("DataT")


@dataclass(frozen=True)
class StartedJob:
    """Holds what an attempt has started.

    Attributes:
        groups: all worker groups but those of the evaluation, by the name of their role.
        make_loop: returns the loop; its arguments are `recorder`, `checkpoints` and `on_first_step`.
    """

    policy: Policy
    groups: dict[str, WorkerGroup]
    make_loop: Callable[..., TrainingLoop]


@dataclass(frozen=True)
class TrainingAttempt(ABC, Generic[ConfigT, DataT]):
    """Starts the worker groups of an attempt and runs the loop. A subclass is one kind of job.

    Attributes:
        plans: the venvs of the roles, by name.
        data: what `open_data` has returned.
        evaluation: the evaluation in the background, if it is on.
    """

    config: ConfigT
    roles: list[Role]
    plans: dict[str, VenvPlan]
    data: DataT
    attempt: Attempt
    evaluation: EvaluationPart | None = None

    @classmethod
    @abstractmethod
    def open_data(cls, config: ConfigT) -> DataT:
        """Open the data of the job. Raises `ConfigError` and `DataError`."""

    @classmethod
    @abstractmethod
    def max_num_steps(cls, config: ConfigT) -> int | None:
        """Return the configured number of steps."""

    @classmethod
    @abstractmethod
    def is_complete(cls, config: ConfigT, step: int, reason: str) -> bool:
        """Return whether a run that ended after `step` for this `reason` has nothing left to do."""

    @classmethod
    @abstractmethod
    def limits(cls, config: ConfigT) -> str:
        """Return what to increase to continue a complete run."""

    @abstractmethod
    def _start(self, checkpoint: Checkpoint | None) -> StartedJob:
        """Check the inputs while Ray starts, then build the venvs, then start all worker groups and wait for them."""

    def train(self) -> tuple[str, int]:
        """Train, and return the reason for the end and the last step."""
        config, attempt = self.config, self.attempt
        checkpoints = CheckpointStore(attempt.run.checkpoint_dir, config.checkpointing)
        checkpoint = checkpoints.latest()
        recorder = attempt.open_recorder(config, checkpoint)
        with gc_paused():
            started = self._start(checkpoint)
        recorder.log_hyperparameters(config.model_dump(mode="json"))
        attestation = attempt.attest(self._with_evaluation(started.groups))
        loop = started.make_loop(
            recorder=recorder,
            checkpoints=checkpoints if config.checkpointing.enabled else None,
            on_first_step=attempt.timeline.mark_first_step,
        )
        if self.evaluation is None:
            return attempt.run_loop(loop, checkpoint)
        return attempt.run_loop(loop, checkpoint, self.evaluation.begin(attempt, started.policy, recorder, attestation))

    def _start_evaluation(self, model_name: str, policy: RayVirtualCluster) -> str | None:
        """Start the workers of the evaluation; return the transport of published weights that reaches them.

        Returns None if there is no evaluation.
        """
        if self.evaluation is None:
            return None
        self.evaluation.start(self.attempt, model_name)
        return self.evaluation.transport_from(policy)

    def _with_evaluation(self, groups: dict[str, WorkerGroup]) -> dict[str, WorkerGroup]:
        return groups if self.evaluation is None else {**groups, **self.evaluation.groups}


def run_training(kind: type[TrainingAttempt[ConfigT, Any]], arguments: JobArguments[ConfigT]) -> None:
    """Run a training job, or print its plan with `--dry-run`. After a crash the same command resumes it."""
    config = arguments.config
    check_model_name(config.policy)
    roles = job_roles(config)
    if arguments.dry_run:
        print_dry_run(config)
        return
    # Errors are reported before anything is started.
    check_weight_files(config.policy.model_name, "policy.model_name")
    plans = role_plans(roles)
    data = kind.open_data(config)
    evaluation = EvaluationPart.of(config)
    run = open_run_directory(config, arguments.name)
    finished = run.finished()
    if finished is not None and kind.is_complete(config, finished["step"], finished["reason"]):
        logger.info("%s is finished: %s. Increase %s to continue it", run.path, finished["reason"], kind.limits(config))
        return
    with open_attempt(run, arguments.name, kind.max_num_steps(config) or 0) as attempt:
        reason, step = kind(config, roles, plans, data, attempt, evaluation).train()
        announce = finish(run, config, step, reason)
    announce()
