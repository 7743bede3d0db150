"""Evaluates one set of weights after another: loads them, completes and scores the problems, keeps the samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nemo_rl
from nemo_rl.jobs.eval_inputs import EvalInputs, sample_records
from nemo_rl.jobs.job_environments import rollout_environment, start_environments
from nemo_rl.observability.rollout_files import RolloutFiles
from nemo_rl.observability.timer import Timer

if TYPE_CHECKING:
    from nemo_rl.algorithms.episodes import EpisodeCollector
    from nemo_rl.algorithms.eval_config import EvalConfig
    from nemo_rl.algorithms.evaluation import ProblemScore
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.environments.environment_group import EnvironmentGroup
    from nemo_rl.environments.remote import RemoteEnvironment
    from nemo_rl.jobs.attempt import WorkerGroup
    from nemo_rl.models.generation.generation import Generation
    from nemo_rl.models.weights.interfaces import WeightUpdate

logger = logging.getLogger(__name__)

_ALL_SAMPLES_MB = 2**40


@dataclass(frozen=True)
class EvaluationWorkers:
    """Holds the workers of an evaluation, which start in the background.

    Attributes:
        environments: the workers, by the name of their role.
    """

    generation: Generation
    environments: Mapping[str, RemoteEnvironment | EnvironmentGroup]

    @classmethod
    def start(cls, config: EvalConfig, cluster: RayVirtualCluster, model: str, stack: ExitStack) -> EvaluationWorkers:
        """Start the workers. `stack` receives callbacks that stop them."""
        from nemo_rl.models.generation.generation import Generation

        environments = start_environments(config.env, stack)
        generation = Generation(cluster, config.policy.of_model(model), model)
        stack.callback(generation.shutdown)
        return cls(generation, environments)

    @property
    def groups(self) -> dict[str, WorkerGroup]:
        """All workers, by the name of their role."""
        return {"generation": self.generation, **self.environments}


@dataclass
class Evaluator:
    """Evaluates weights on the problems of an evaluation.

    Attributes:
        environment: what rollouts are collected from.
        files: receives the samples.
        venvs: see `venv_digests`.
    """

    config: EvalConfig
    inputs: EvalInputs
    generation: Generation
    environment: RemoteEnvironment | EpisodeCollector
    files: RolloutFiles
    venvs: dict[str, list[str | None]]

    @classmethod
    def open(
        cls,
        config: EvalConfig,
        inputs: EvalInputs,
        workers: EvaluationWorkers,
        attestation: Iterable[Mapping[str, Any]],
        directory: Path,
        stack: ExitStack,
        *,
        resume_step: int | None,
    ) -> Evaluator:
        """Wait for the workers, and open the files.

        Args:
            config: what is evaluated.
            inputs: its problems.
            workers: complete and score them.
            attestation: one record of each worker, with the name of its role as `group`.
            directory: directory of the results. It has the attestation.
            stack: receives a callback.
            resume_step: samples of later steps are removed; all if it is None.
        """
        generation = workers.generation
        environment = rollout_environment(
            config, workers.environments, generation, inputs.renderer, inputs.pad_token_id, stack
        )
        files = RolloutFiles(directory, limit_mb=_ALL_SAMPLES_MB, resume_step=resume_step)
        return cls(config, inputs, generation, environment, files, venv_digests(attestation))

    def restart_environment(self, stack: ExitStack) -> None:
        """Restart an environment that scores batches, in the background. Those with turns restart their own workers.

        Args:
            stack: receives a callback that stops it.
        """
        from nemo_rl.environments.remote import RemoteEnvironment

        if isinstance(self.environment, RemoteEnvironment):
            self.environment.shutdown()
            self.environment = RemoteEnvironment(self.config.env)
            stack.callback(self.environment.shutdown)

    def evaluate(
        self, name: str, label: str, step: int, publish: Callable[[], WeightUpdate]
    ) -> tuple[dict[str, Any], list[ProblemScore]]:
        """Load weights into the workers, write their samples, and return their record and scores for `EvalResults.add`.

        Args:
            name: name of the model.
            label: how tables and the report name it.
            step: its number, see `EvalResults`.
            publish: returns the published weights.
        """
        from nemo_rl.algorithms.evaluation import collect_samples, score_problems

        config, batch, timer = self.config, self.inputs.batch, Timer()
        count = batch.size * config.eval.num_generations
        logger.info("evaluating %s on %d problems, %d samples", label, batch.size, count)
        with timer.phase("load weights"):
            digest = self.generation.update_weights(publish())
        rollout = collect_samples(config, batch, self.generation, self.environment, timer)
        scores = score_problems(rollout, batch, config)
        self.files.write(step, sample_records(rollout, self.inputs, config.env.name, step))
        record = {
            "model": name,
            "label": label,
            "step": step,
            "weights_digest": digest,
            "precision": config.policy.generation_precision,
            "venv_digests": self.venvs,
            "nemo_rl": nemo_rl.__version__,
            "num_problems": batch.size,
            "num_samples": count,
            "num_failed": int((~rollout.scored).sum()),
            "environment_metrics": rollout.metrics,
            "seconds": timer.seconds(),
        }
        return record, scores


def venv_digests(attestation: Iterable[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Return the venv digests of each worker group (None: the driver's Python)."""
    digests: dict[str, list[str | None]] = {}
    for record in attestation:
        of_group = digests.setdefault(record["group"], [])
        if record.get("venv_digest") not in of_group:
            of_group.append(record.get("venv_digest"))
    return digests
