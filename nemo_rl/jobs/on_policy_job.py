"""Runs jobs that train on the policy's samples: GRPO and distillation.

::

    main thread     Ray ───────────────────┬─► venvs on every node ─┐   ┌─ policy ──────┐
                                           │                        ├───┼─ generation ──┼─► loop ─────► report
    second thread   model, tokenizer, data ┴─► embedded model ──────┘   └─ environment ─┘

However a job ends, it stops everything it started, in reverse order.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_rl.algorithms.config import OnPolicyJobConfig
from nemo_rl.jobs.attempt import INPUTS_THREAD, WorkerGroup
from nemo_rl.jobs.job_environments import (
    Problems,
    load_problems,
    make_loader,
    make_renderer,
    make_validation_batch,
    rollout_environment,
    start_environments,
)
from nemo_rl.jobs.model_files import ModelFiles, check_checkpoint_model, prepare_model
from nemo_rl.jobs.roles import num_colocated_groups
from nemo_rl.jobs.training_job import StartedJob, TrainingAttempt
from nemo_rl.jobs.weight_route import check_weight_route, route_between
from nemo_rl.utils.futures import run_in_thread

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nemo_rl.algorithms.on_policy import OnPolicyLoop
    from nemo_rl.data.loader import MixedLoader, PromptLoader
    from nemo_rl.data.transcripts import TranscriptRenderer
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.utils.checkpoint import Checkpoint


OnPolicyConfigT = TypeVar("OnPolicyConfigT", bound=OnPolicyJobConfig)


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
class OnPolicyAttempt(TrainingAttempt[OnPolicyConfigT, dict[str, Problems]], ABC):
    """Trains on the policy's samples. A subclass is one algorithm."""

    @classmethod
    def open_data(cls, config: OnPolicyConfigT) -> dict[str, Problems]:
        return load_problems(config)

    @classmethod
    def max_num_steps(cls, config: OnPolicyConfigT) -> int:
        return config.algorithm.max_num_steps

    @classmethod
    def is_complete(cls, config: OnPolicyConfigT, step: int, reason: str) -> bool:
        return step >= config.algorithm.max_num_steps

    @classmethod
    def limits(cls, config: OnPolicyConfigT) -> str:
        return f"{config.algorithm_key}.max_num_steps"

    @abstractmethod
    def _make_loop(self, others: dict[str, WorkerGroup], **parts: Any) -> OnPolicyLoop:
        """Return the training loop of these parts."""

    def _create_models(self, checked: Future[OnPolicyInputs]) -> str:
        """Return the model that the policy's workers load; see `Attempt.create_model`."""
        return self.attempt.create_model(self.config.policy, checked)

    def _check_others(self, model: ModelFiles) -> None:
        """Raise for other models that do not fit the policy's, before a venv is built."""

    def _start_others(self, cluster: RayVirtualCluster, inputs: OnPolicyInputs) -> dict[str, WorkerGroup]:
        """Start further groups of the algorithm, on the policy's cluster or their own."""
        return {}

    def _start(self, checkpoint: Checkpoint | None) -> StartedJob:
        preparing = run_in_thread(lambda: self._prepare_inputs(checkpoint), "inputs")
        creating = run_in_thread(lambda: self._create_models(preparing), "model")
        clusters = self._start_clusters()
        inputs = preparing.result()  # users' mistakes are reported before a venv is built
        self.attempt.build_venvs(self.roles, self.plans)
        model_name = creating.result()
        with self.attempt.timeline.phase("start workers", waits=True):
            return self._start_workers(model_name, clusters, inputs)

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

            loader = make_loader(config, self.data, model, started)
            if checkpoint is not None:
                restore_data_position(loader, checkpoint)  # `resume` does, too, but only when the workers run
            validation = make_validation_batch(config, self.data, model, started)
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

    def _start_workers(self, model_name: str, clusters: _Clusters, inputs: OnPolicyInputs) -> StartedJob:
        """Start all worker groups, then wait for them. The first error ends the job."""
        from nemo_rl.models.generation.generation import Generation
        from nemo_rl.models.policy.policy import Policy

        config, stack = self.config, self.attempt.stack
        environments = start_environments(config.env, stack)
        route = route_between(clusters.policy, clusters.generation, config.policy.weight_transport)
        if self._start_evaluation(model_name, clusters.policy) == "ray":
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
        self.attempt.wait_ready(self._with_evaluation(groups))
        pad_token_id = inputs.model.pad_token_id
        make_loop = functools.partial(
            self._make_loop,
            others,
            config=config,
            policy=policy,
            generation=generation,
            environment=rollout_environment(config, environments, generation, inputs.renderer, pad_token_id, stack),
            loader=inputs.loader,
            validation=inputs.validation,
            pad_token_id=pad_token_id,
        )
        return StartedJob(policy, groups, make_loop)
