"""The part of a training job that evaluates in the background: its problems, its workers and its thread."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nemo_rl.errors import EnvironmentFailure
from nemo_rl.jobs.background_evaluation import BackgroundEvaluation, metrics_of
from nemo_rl.jobs.eval_inputs import EvalInputs, load_problems, prepare_inputs
from nemo_rl.jobs.evaluator import EvaluationWorkers, Evaluator
from nemo_rl.jobs.job_config import JobConfig, evaluation_of, evaluation_section
from nemo_rl.jobs.model_files import check_model_fits, load_architecture
from nemo_rl.jobs.roles import EVALUATION_PREFIX
from nemo_rl.jobs.weight_route import route_between
from nemo_rl.observability.logger import METRICS_FILE
from nemo_rl.observability.report import EVALUATION_DIRECTORY
from nemo_rl.observability.rollout_files import ATTESTATION_FILE
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.jsonl import read_jsonl

if TYPE_CHECKING:
    from nemo_rl.algorithms.eval_config import EvalConfig
    from nemo_rl.algorithms.evaluation import ProblemScore
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.jobs.attempt import Attempt, WorkerGroup
    from nemo_rl.jobs.model_files import ModelFiles
    from nemo_rl.models.policy.policy import Policy
    from nemo_rl.models.weights.interfaces import WeightUpdate
    from nemo_rl.observability.logger import Logger
    from nemo_rl.utils.checkpoint import Checkpoint


class EvaluationPart:
    """Prepares the evaluation in the background of an attempt, starts its workers, and begins it.

    A job calls the methods in the order of their definition.

    Example::

        part = EvaluationPart.of(config)
        if part is not None:
            part.prepare(attempt, model_files, checkpoint)
            part.start(attempt, model_name)
            ...
            attempt.run_loop(loop, checkpoint, part.begin(attempt, policy, recorder, attestation))

    Attributes:
        groups: its worker groups, by the names of their roles.
    """

    groups: Mapping[str, WorkerGroup]

    def __init__(self, job: JobConfig, config: EvalConfig) -> None:
        """Open the problems. Raises the errors of `load_problems`."""
        self._schedule, self._model = evaluation_section(job), job.policy.model_name
        self._config = config
        self._problems = load_problems(config)
        self._running: BackgroundEvaluation | None = None

    @classmethod
    def of(cls, job: JobConfig) -> EvaluationPart | None:
        """Return the part of a job; None if the evaluation is off. Raises the errors of `load_problems`."""
        config = evaluation_of(job)
        return None if config is None else cls(job, config)

    def prepare(self, attempt: Attempt, files: ModelFiles, checkpoint: Checkpoint | None) -> None:
        """Check the model, tokenize the problems, and read the scores of earlier attempts.

        Args:
            attempt: the attempt of the job.
            files: its tokenizer.
            checkpoint: where it resumes, if it does.

        Raises:
            ConfigError, DataError: the model or the problems do not fit, or the problems have changed.
        """
        from nemo_rl.jobs.eval_results import EvalResults  # imports torch

        policy = self._config.policy.of_model(self._model)
        check_model_fits(policy, load_architecture(policy), use_gpus=self._config.cluster.use_gpus)
        self._inputs: EvalInputs = prepare_inputs(self._config, self._problems, files, attempt.run.started)
        self._directory = attempt.run.path / EVALUATION_DIRECTORY
        self._resume_step = None if checkpoint is None else checkpoint.step
        self._results = EvalResults(self._directory)
        self._results.keep_until(self._resume_step)
        self._results.check_problems(self._inputs.digests)

    def start(self, attempt: Attempt, model: str) -> None:
        """Reserve its bundles, and start its workers with the weights of `model`. They start in the background."""
        self._cluster = attempt.make_cluster(self._config.cluster, "evaluation")
        attempt.stack.callback(self._join)  # runs when the workers have ended
        self._workers = EvaluationWorkers.start(self._config, self._cluster, model, attempt.stack)
        self.groups = {f"{EVALUATION_PREFIX}{name}": group for name, group in self._workers.groups.items()}

    def transport_from(self, policy: RayVirtualCluster) -> str:
        """Return the transport of published weights that reaches the evaluation from a policy on this cluster."""
        return route_between(policy, self._cluster).published

    def begin(
        self, attempt: Attempt, policy: Policy, recorder: Logger, attestation: Iterable[Mapping[str, Any]]
    ) -> BackgroundEvaluation:
        """Wait for the workers and start the thread. Steps that earlier attempts did not evaluate are recorded.

        Args:
            attempt: the attempt of the job.
            policy: publishes its weights.
            recorder: receives the metrics.
            attestation: what `Attempt.attest` returned for all groups of the job.
        """
        records = [
            {**record, "group": record["group"].removeprefix(EVALUATION_PREFIX)}
            for record in attestation
            if record["group"] in self.groups
        ]
        write_atomically(self._directory / ATTESTATION_FILE, json.dumps(records, indent=1))
        evaluator = Evaluator.open(
            self._config,
            self._inputs,
            self._workers,
            records,
            self._directory,
            attempt.stack,
            resume_step=self._resume_step,
        )
        self._complete_records(attempt, recorder)
        precision = self._config.policy.generation_precision

        def evaluate(step: int, update: WeightUpdate) -> tuple[dict[str, Any], list[ProblemScore]]:
            try:
                return evaluator.evaluate(f"step_{step:06d}", f"step {step}", step, lambda: update)
            except EnvironmentFailure:
                evaluator.restart_environment(attempt.stack)  # for the next evaluation
                raise

        self._running = BackgroundEvaluation(
            self._schedule,
            self._results,
            publish=lambda step: policy.publish_weights(step, precision),
            evaluate=evaluate,
            log_metrics=recorder.log_metrics,
        )
        attempt.stack.callback(self._running.stop)
        return self._running

    def _complete_records(self, attempt: Attempt, recorder: Logger) -> None:
        """Record what a killed attempt had no time for: metrics of finished evaluations, and unfinished ones."""
        if self._resume_step is None:
            return
        results = self._results
        known = results.steps | {record["step"] for record in results.content["not_evaluated"]}
        for step in range(self._resume_step):  # the loop evaluates the weights of the step itself
            if self._schedule.is_due(step) and step not in known:
                results.leave_out(step, "skipped: the run was interrupted before it was finished")
        logged = {
            record["step"]
            for record in read_jsonl(attempt.run.path / METRICS_FILE)
            if any(name.startswith("eval/") for name in record)
        }
        for model in results.content["models"]:
            if model["step"] not in logged:
                recorder.log_metrics(model["step"], metrics_of(model))

    def _join(self) -> None:
        if self._running is not None:
            self._running.join()
