"""Runs jobs that train on the policy's samples: GRPO and distillation.

::

    main thread     Ray ───────────────────┬─► venvs on every node ─┐   ┌─ policy ──────┐
                                           │                        ├───┼─ generation ──┼─► loop ─────► report
    second thread   model, tokenizer, data ┴─► embedded model ──────┘   └─ environment ─┘

However a job ends, it stops everything it started, in reverse order.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nemo_rl.algorithms.config import OnPolicyJobConfig
from nemo_rl.jobs.attempt import INPUTS_THREAD, Attempt, WorkerGroup, finish, open_attempt, print_dry_run
from nemo_rl.jobs.command_line import JobArguments
from nemo_rl.jobs.evaluation_part import EvaluationPart
from nemo_rl.jobs.job_environments import (
    Problems,
    load_problems,
    make_loader,
    make_renderer,
    make_validation_batch,
    rollout_environment,
    start_environments,
)
from nemo_rl.jobs.model_files import (
    ModelFiles,
    check_checkpoint_model,
    check_model_name,
    check_weight_files,
    prepare_model,
)
from nemo_rl.jobs.roles import Role, check_weight_route, job_roles, num_colocated_groups, role_plans
from nemo_rl.jobs.run_directory import open_run_directory
from nemo_rl.utils.checkpoint import CheckpointStore
from nemo_rl.utils.futures import run_in_thread
from nemo_rl.utils.garbage import gc_paused

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nemo_rl.algorithms.episodes import EpisodeCollector
    from nemo_rl.algorithms.on_policy import OnPolicyLoop
    from nemo_rl.data.loader import MixedLoader, PromptLoader
    from nemo_rl.data.transcripts import TranscriptRenderer
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.environments.remote import RemoteEnvironment
    from nemo_rl.models.generation.generation import Generation
    from nemo_rl.models.policy.policy import Policy
    from nemo_rl.models.weights.routes import Route
    from nemo_rl.utils.checkpoint import Checkpoint
    from nemo_rl.venvs import VenvPlan

logger = logging.getLogger(__name__)


def run_on_policy(arguments: JobArguments[Any], attempt_class: type[OnPolicyAttempt]) -> None:
    """Run a job that trains on the policy's samples, or print its plan with `--dry-run`."""
    config: OnPolicyJobConfig = arguments.config
    check_model_name(config.policy)
    roles = job_roles(config)
    if arguments.dry_run:
        print_dry_run(config)
        return
    # Errors are reported before anything is started.
    check_weight_files(config.policy.model_name, "policy.model_name")
    plans = role_plans(roles)
    problems = load_problems(config)
    evaluation = EvaluationPart.of(config)
    run = open_run_directory(config, arguments.name)
    finished = run.finished()
    if finished is not None and finished["step"] >= config.algorithm.max_num_steps:
        logger.info(
            "%s is finished: %s. Increase %s.max_num_steps to continue it",
            run.path,
            finished["reason"],
            config.algorithm_key,
        )
        return
    with open_attempt(run, arguments.name, config.algorithm.max_num_steps) as attempt:
        reason, step = attempt_class(config, roles, plans, problems, attempt, evaluation).train()
    finish(run, config, step, reason)


@dataclass(frozen=True)
class OnPolicyInputs:
    """Holds the inputs that the second thread prepares."""

    model: ModelFiles
    loader: PromptLoader | MixedLoader
    validation: BatchedDataDict | None
    renderer: TranscriptRenderer | None


@dataclass(frozen=True)
class _Clusters:
    """Holds the cluster of each worker group; both are the same object if the groups share bundles."""

    policy: RayVirtualCluster
    generation: RayVirtualCluster


@dataclass(frozen=True)
class _Workers:
    """Holds the started worker groups of the job.

    Attributes:
        others: further groups of the algorithm, by the name of their role.
        groups: all groups, by the name of their role.
        environment: what the loop collects rollouts from.
    """

    policy: Policy
    generation: Generation
    others: dict[str, WorkerGroup]
    groups: dict[str, WorkerGroup]
    environment: RemoteEnvironment | EpisodeCollector


@dataclass(frozen=True)
class OnPolicyAttempt(ABC):
    """Starts the worker groups of an attempt and runs the loop. A subclass is one algorithm.

    Attributes:
        plans: the venvs of the roles, by name.
        evaluation: the evaluation in the background, if it is on.
    """

    config: OnPolicyJobConfig
    roles: list[Role]
    plans: dict[str, VenvPlan]
    problems: dict[str, Problems]
    attempt: Attempt
    evaluation: EvaluationPart | None = None

    def train(self) -> tuple[str, int]:
        """Train, and return the reason for the end and the last step."""
        config, attempt = self.config, self.attempt
        checkpoints = CheckpointStore(attempt.run.checkpoint_dir, config.checkpointing)
        checkpoint = checkpoints.latest()
        recorder = attempt.open_recorder(config, checkpoint)
        with gc_paused():
            inputs, workers = self._start(checkpoint)
        recorder.log_hyperparameters(config.model_dump(mode="json"))
        attestation = attempt.attest(workers.groups)
        loop = self._make_loop(
            workers.others,
            config=config,
            policy=workers.policy,
            generation=workers.generation,
            environment=workers.environment,
            loader=inputs.loader,
            validation=inputs.validation,
            recorder=recorder,
            checkpoints=checkpoints if config.checkpointing.enabled else None,
            pad_token_id=inputs.model.pad_token_id,
            on_first_step=attempt.timeline.mark_first_step,
        )
        if self.evaluation is None:
            return attempt.run_loop(loop, checkpoint)
        evaluation = self.evaluation.begin(attempt, workers.policy, recorder, attestation)
        return attempt.run_loop(loop, checkpoint, evaluation)

    @abstractmethod
    def _make_loop(self, others: dict[str, WorkerGroup], **parts: Any) -> OnPolicyLoop:
        """Return the training loop of these parts."""

    def _create_models(self, checked: Future[OnPolicyInputs]) -> str:
        """Return the model that the policy's workers load; see `Attempt.create_model`."""
        return self.attempt.create_model(self.config.policy, checked)

    def _check_others(self, model: ModelFiles) -> None:  # noqa: B027 - optional
        """Raise for other models that do not fit the policy's, before a venv is built."""

    def _start_others(self, cluster: RayVirtualCluster, inputs: OnPolicyInputs) -> dict[str, WorkerGroup]:
        """Start further groups of the algorithm, on the policy's cluster or their own."""
        return {}

    def _start(self, checkpoint: Checkpoint | None) -> tuple[OnPolicyInputs, _Workers]:
        """Check the inputs while Ray starts, then build the venvs, then start all worker groups."""
        preparing = run_in_thread(lambda: self._prepare_inputs(checkpoint), "inputs")
        creating = run_in_thread(lambda: self._create_models(preparing), "model")
        clusters = self._start_clusters()
        inputs = preparing.result()  # users' mistakes are reported before a venv is built
        self.attempt.build_venvs(self.roles, self.plans)
        model_name = creating.result()
        with self.attempt.timeline.phase("start workers", waits=True):
            workers = self._start_workers(model_name, clusters, inputs)
        return inputs, workers

    def _prepare_inputs(self, checkpoint: Checkpoint | None) -> OnPolicyInputs:
        config, started = self.config, self.attempt.run.started
        with self.attempt.timeline.phase("model and tokenizer", INPUTS_THREAD):
            check_weight_route(config)
            model = prepare_model(config.policy, use_gpus=config.cluster.for_generation.use_gpus)
            if checkpoint is not None:
                check_checkpoint_model(checkpoint, config.policy)
            self._check_others(model)
        with self.attempt.timeline.phase("data", INPUTS_THREAD):
            from nemo_rl.algorithms.on_policy import restore_data_position

            loader = make_loader(config, self.problems, model, started)
            if checkpoint is not None:
                restore_data_position(loader, checkpoint)  # `resume` does, too, but only when the workers run
            validation = make_validation_batch(config, self.problems, model, started)
            renderer = make_renderer(config, model, started)
            if self.evaluation is not None:
                self.evaluation.prepare(self.attempt, model, checkpoint)
        return OnPolicyInputs(model, loader, validation, renderer)

    def _start_clusters(self) -> _Clusters:
        """Join or start Ray and describe the clusters of the worker groups, without reserving resources."""
        config, name = self.config.cluster, self.config.algorithm_key
        self.attempt.join_ray()
        policy = self.attempt.make_cluster(config, name, num_colocated_groups(self.config))
        if config.generation is None:
            return _Clusters(policy, policy)
        return _Clusters(policy, self.attempt.make_cluster(config.generation, f"{name} generation"))

    def _start_workers(self, model_name: str, clusters: _Clusters, inputs: OnPolicyInputs) -> _Workers:
        """Start all worker groups, then wait for them. The first error ends the job."""
        from nemo_rl.models.generation.generation import Generation
        from nemo_rl.models.policy.policy import Policy

        config, stack = self.config, self.attempt.stack
        environments = start_environments(config.env, stack)
        route = _weight_route(config.policy.weight_transport, clusters)
        if self.evaluation is not None:
            self.evaluation.start(self.attempt, model_name)
            if self.evaluation.transport_from(clusters.policy) == "ray":
                route = replace(route, published="ray")
        policy = Policy(
            clusters.policy,
            config.policy,
            model_name,
            total_steps=config.num_optimizer_steps,
            seed=config.algorithm.seed,
            route=route,
        )
        stack.callback(policy.shutdown)
        generation = Generation(clusters.generation, config.policy, model_name)
        stack.callback(generation.shutdown)
        others = self._start_others(clusters.policy, inputs)
        groups: dict[str, WorkerGroup] = {"policy": policy, "generation": generation, **others, **environments}
        if self.evaluation is not None:
            groups |= self.evaluation.groups
        self.attempt.wait_ready(groups)
        environment = rollout_environment(
            config, environments, generation, inputs.renderer, inputs.model.pad_token_id, stack
        )
        return _Workers(policy, generation, others, groups, environment)


def _weight_route(chosen: str, clusters: _Clusters) -> Route:
    """Choose the weight transport between these clusters. Raises the errors of `choose_route`."""
    import ray

    from nemo_rl.models.weights.routes import Place, choose_route

    return choose_route(
        chosen,
        policy=[Place.of(bundle) for bundle in clusters.policy.bundles()],
        generation=[Place.of(bundle) for bundle in clusters.generation.bundles()],
        driver_node_id=ray.get_runtime_context().get_node_id(),
    )
