"""Runs a GRPO job: starts its worker groups, runs the loop of `nemo_rl.algorithms.grpo`, and writes the report.

::

    main thread     Ray ───────────────────┬─► venvs on every node ─┐   ┌─ policy ──────┐
                                           │                        ├───┼─ generation ──┼─► GRPO.run ─► report
    second thread   model, tokenizer, data ┴─► embedded model ──────┘   └─ environment ─┘

However the job ends, it stops everything it started, in reverse order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.jobs.command_line import JobArguments, run_command
from nemo_rl.jobs.job_environments import (
    Problems,
    load_problems,
    make_collector,
    make_loader,
    make_renderer,
    make_validation_batch,
    start_environment,
)
from nemo_rl.jobs.model_files import check_model_name, check_weight_files, ensure_model, prepare_model
from nemo_rl.jobs.roles import Role, check_weight_route, job_roles, num_colocated_groups, role_plans
from nemo_rl.jobs.run_directory import RunDirectory, open_run_directory
from nemo_rl.jobs.venv_phases import VenvPhases
from nemo_rl.observability.console import ConsoleView
from nemo_rl.observability.logger import Logger
from nemo_rl.observability.timer import Timeline, TimelineEvent
from nemo_rl.utils.checkpoint import CheckpointStore
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.futures import run_in_thread
from nemo_rl.utils.garbage import gc_paused

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nemo_rl.algorithms.episodes import EpisodeCollector
    from nemo_rl.data.loader import MixedLoader, PromptLoader
    from nemo_rl.data.transcripts import TranscriptRenderer
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.distributed.config import BundlesConfig
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.environments.environment_group import EnvironmentGroup
    from nemo_rl.environments.remote import RemoteEnvironment
    from nemo_rl.models.generation.generation import Generation
    from nemo_rl.models.policy.policy import Policy
    from nemo_rl.models.weights.routes import Route
    from nemo_rl.utils.checkpoint import Checkpoint
    from nemo_rl.venvs import VenvPlan

logger = logging.getLogger(__name__)

INPUTS_THREAD = "driver: inputs"


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the GRPO command line and return its exit code; see `run_command`."""
    return run_command(MasterConfig, "grpo_math_embedded", run_grpo, argv, program=program)


def run_grpo(arguments: JobArguments[MasterConfig]) -> None:
    """Run a GRPO job, or print its plan with `--dry-run`."""
    config = arguments.config
    check_model_name(config.policy)
    roles = job_roles(config)
    if arguments.dry_run:
        from nemo_rl.jobs.plan import make_plan
        from nemo_rl.jobs.plan_view import print_plan

        console = Console()
        print_plan(make_plan(config), console if console.is_terminal else Console(width=160))
        return
    # Errors are reported before anything is started.
    check_weight_files(config.policy.model_name, "policy.model_name")
    plans = role_plans(roles)
    problems = load_problems(config)
    run = open_run_directory(config, arguments.name)
    finished = run.finished()
    if finished is not None and finished["step"] >= config.grpo.max_num_steps:
        logger.info("%s is finished: %s. Increase grpo.max_num_steps to continue it", run.path, finished["reason"])
        return
    run.reopen()
    with ExitStack() as stack:
        view = stack.enter_context(ConsoleView(arguments.name, config.grpo.max_num_steps))
        timeline = Timeline(run.path, view)
        timeline.record_process_start()
        reason, step = _RunAttempt(config, roles, plans, problems, run, view, timeline, stack).train()
    run.finish(step, reason)
    logger.info("finished after step %d: %s", step, reason)
    if config.logger.report:
        from nemo_rl.observability.report import write_report

        logger.info("report: %s", write_report(run.path))


@dataclass(frozen=True)
class _Inputs:
    """Holds the inputs that the second thread prepares."""

    pad_token_id: int
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
        environments: the workers, by the name of their role.
        environment: what the loop collects rollouts from.
    """

    policy: Policy
    generation: Generation
    environments: dict[str, RemoteEnvironment | EnvironmentGroup]
    environment: RemoteEnvironment | EpisodeCollector


@dataclass(frozen=True)
class _RunAttempt:
    """Runs one attempt of a run, from an opened run directory to the end of the loop.

    Attributes:
        plans: the venvs of the roles, by name.
        stack: receives a shutdown callback for everything that the attempt starts.
    """

    config: MasterConfig
    roles: list[Role]
    plans: dict[str, VenvPlan]
    problems: dict[str, Problems]
    run: RunDirectory
    view: ConsoleView
    timeline: Timeline
    stack: ExitStack

    def train(self) -> tuple[str, int]:
        """Train, and return the reason for the end and the last step."""
        config = self.config
        checkpoints = CheckpointStore(self.run.checkpoint_dir, config.checkpointing)
        checkpoint = checkpoints.latest()
        # Opened first, so that a missing logging backend is reported before anything is started.
        recorder = self.stack.enter_context(
            Logger(
                self.run.path,
                config.logger,
                resume_step=checkpoint.step if checkpoint else None,
                listeners=[self.view],
            )
        )
        with gc_paused():
            inputs, workers = self._start(checkpoint)
        recorder.log_hyperparameters(config.model_dump(mode="json"))
        records = _attest(workers)
        self.timeline.extend(_worker_events(records))
        write_atomically(self.run.path / "attestation.json", json.dumps(records, indent=1))
        from nemo_rl.algorithms.grpo import GRPO

        loop = GRPO(
            config=config,
            policy=workers.policy,
            generation=workers.generation,
            environment=workers.environment,
            loader=inputs.loader,
            validation=inputs.validation,
            recorder=recorder,
            checkpoints=checkpoints if config.checkpointing.enabled else None,
            pad_token_id=inputs.pad_token_id,
            on_first_step=self.timeline.mark_first_step,
        )
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint.path)
            with self.timeline.phase("load checkpoint"):
                loop.resume(checkpoint)
        return loop.run(), loop.step

    def _start(self, checkpoint: Checkpoint | None) -> tuple[_Inputs, _Workers]:
        """Check the inputs while Ray starts, then build the venvs, then start all worker groups."""
        preparing = run_in_thread(lambda: self._prepare_inputs(checkpoint), "inputs")
        creating = run_in_thread(lambda: self._create_model(preparing), "model")
        clusters = self._start_clusters()
        inputs = preparing.result()  # users' mistakes are reported before a venv is built
        names = {venv: ", ".join(r.name for r in self.roles if r.venv == venv) for venv in self.plans}
        with self.timeline.phase("venvs"), VenvPhases(self.view, self.timeline, names) as phases:
            from nemo_rl.distributed.node_venvs import ensure_venvs_on_each_node

            ensure_venvs_on_each_node(self.plans, progress=phases)
        model_name = creating.result()
        with self.timeline.phase("start workers", waits=True):
            workers = self._start_workers(model_name, clusters, inputs)
        return inputs, workers

    def _prepare_inputs(self, checkpoint: Checkpoint | None) -> _Inputs:
        config, started = self.config, self.run.started
        with self.timeline.phase("model and tokenizer", INPUTS_THREAD):
            check_weight_route(config)
            model = prepare_model(config.policy, use_gpus=config.cluster.for_generation.use_gpus)
        with self.timeline.phase("data", INPUTS_THREAD):
            from nemo_rl.algorithms.grpo import restore_data_position

            loader = make_loader(config, self.problems, model, started)
            if checkpoint is not None:
                restore_data_position(loader, checkpoint)  # `resume` does, too, but only when the workers run
            validation = make_validation_batch(config, self.problems, model, started)
            renderer = make_renderer(config, model, started)
        return _Inputs(model.pad_token_id, loader, validation, renderer)

    def _create_model(self, preparing: Future[_Inputs]) -> str:
        preparing.result()
        with self.timeline.phase("create model", INPUTS_THREAD):
            return ensure_model(self.config.policy)

    def _start_clusters(self) -> _Clusters:
        """Join or start Ray and describe the clusters of the worker groups, without reserving resources."""
        config = self.config.cluster
        with self.timeline.phase("Ray"):
            import ray

            from nemo_rl.distributed.virtual_cluster import RayVirtualCluster, init_ray

            self.stack.callback(ray.shutdown)
            init_ray(log_dir=str(self.run.path))

            def cluster_of(part: BundlesConfig, name: str) -> RayVirtualCluster:
                cluster = RayVirtualCluster(
                    [part.workers_per_node] * part.num_nodes,
                    use_gpus=part.use_gpus,
                    num_gpus_per_node=max(part.gpus_per_node, 1),
                    max_colocated_worker_groups=num_colocated_groups(self.config),
                    name=name,
                )
                self.stack.callback(cluster.shutdown)
                return cluster

            policy = cluster_of(config, "grpo")
            generation = policy if config.generation is None else cluster_of(config.generation, "grpo generation")
        return _Clusters(policy, generation)

    def _start_workers(self, model_name: str, clusters: _Clusters, inputs: _Inputs) -> _Workers:
        """Start all worker groups, then wait for them. The first error ends the job."""
        from nemo_rl.environments.remote import RemoteEnvironment
        from nemo_rl.models.generation.generation import Generation
        from nemo_rl.models.policy.policy import Policy

        config = self.config
        groups = {name: start_environment(name, entry) for name, entry in config.env.entries().items()}
        environments: dict[str, RemoteEnvironment | EnvironmentGroup] = {
            f"environment {name}": group for name, group in groups.items()
        }
        environment: RemoteEnvironment | EpisodeCollector
        if not groups:
            environment = environments["environment"] = RemoteEnvironment(config.env)
        for started in environments.values():
            self.stack.callback(started.shutdown)
        policy = Policy(
            clusters.policy,
            config.policy,
            model_name,
            total_steps=config.num_optimizer_steps,
            seed=config.grpo.seed,
            route=_weight_route(config.policy.weight_transport, clusters),
        )
        self.stack.callback(policy.shutdown)
        generation = Generation(clusters.generation, config.policy, model_name)
        self.stack.callback(generation.shutdown)
        for name, group in {"policy": policy, "generation": generation, **environments}.items():
            with self.timeline.phase(f"{name} ready", waits=True):
                group.wait_ready()
        if inputs.renderer is not None:
            environment = make_collector(config, groups, generation, inputs.renderer, inputs.pad_token_id)
            self.stack.callback(environment.close)
        return _Workers(policy, generation, environments, environment)


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


def _attest(workers: _Workers) -> list[dict[str, Any]]:
    """Return one record per worker of the job: node, venv, versions and startup phases."""
    groups = {
        "policy": workers.policy.attestation(),
        "generation": workers.generation.attestation(),
        **{name: environment.attestation() for name, environment in workers.environments.items()},
    }
    return [{"group": group, **record} for group, members in groups.items() for record in members]


def _worker_events(records: list[dict[str, Any]]) -> list[TimelineEvent]:
    return [
        TimelineEvent(name, record.get("name", record["group"]), record["hostname"], start, end)
        for record in records
        for name, start, end in record["phases"]
    ]
