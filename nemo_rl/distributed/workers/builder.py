"""The builder of workers: Ray actors that run in their class's venv."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from nemo_rl.distributed.cluster.session import init_ray
from nemo_rl.distributed.workers.launch_plan import (
    IsolatedWorkerInitializer,
    LaunchPlan,
    plan_launch,
    prepare_venvs_of,
)
from nemo_rl.distributed.workers.runtime_env import (
    ConfiguredWorker,
    WorkerOptions,
    is_early,
    merged_runtime_env,
    scheduled,
)
from nemo_rl.distributed.workers.runtime_env_fields import (
    checked_env_vars,
    checked_runtime_env,
)
from nemo_rl.distributed.workers.startup import StaleDescription, StartingWorker, await_started, kill_and_wait
from nemo_rl.errors import WorkerError, WorkerStartError
from nemo_rl.utils.futures import run_in_thread

logger = logging.getLogger(__name__)

# A class that differs from its description more often than this is being edited while it starts.
_MAX_DESCRIPTIONS = 3
# Options of a class that Ray does not accept per actor, or that the plan already holds.
_NOT_PER_ACTOR = ("runtime_env", "concurrency_groups")


@dataclass(frozen=True)
class WorkerRequest:
    """One worker to start.

    Attributes:
        label: its name in messages, such as "rank 3 (policy-0-3)".
        placement_group, bundle_index: the bundle that it runs in; None and -1 where Ray chooses a node.
        node_id: the node of the bundle; None where Ray chooses.
        ray_options: Ray's actor options of the call.
        configure_arguments: the arguments of the class's `configure_worker`.
        env_vars: variables of this worker only, such as RANK, set before its module is imported.
    """

    label: str
    placement_group: PlacementGroup | None = None
    bundle_index: int = -1
    node_id: str | None = None
    ray_options: Mapping[str, Any] = field(default_factory=dict)
    configure_arguments: dict[str, Any] = field(default_factory=dict)
    env_vars: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StartedWorkers:
    """Workers whose constructors have returned.

    Attributes:
        plan: the plan they were started with.
        handles: the actors' handles, in the order of the requests.
        attestations: what each worker reported before its first task, in the same order.
    """

    plan: LaunchPlan
    handles: list[ActorHandle]
    attestations: list[dict[str, Any]]


class RayWorkerBuilder:
    """Starts workers of a class in the class's venv. The driver names the class by string and never imports it.

    Example::

        init_ray()
        builder = RayWorkerBuilder("collections.Counter", "abracadabra", py_executable=sys.executable)
        counter = builder(None, 0, num_gpus=0)
        ray.get(counter.most_common.remote(1))  # [("a", 5)]

    Args:
        ray_actor_class_fqn: `package.module.Class`; a plain class or one with `@ray.remote`.
        *args: positional arguments of the class's constructor, in the worker.
        **kwargs: keyword arguments of the class's constructor.
        py_executable: overrides the registry's entry for the class.
        runtime_env: fields of Ray's `RuntimeEnv` for all workers of this builder.

    A call may override `py_executable` and `runtime_env`, and takes any other of Ray's actor options.
    """

    IsolatedWorkerInitializer = IsolatedWorkerInitializer

    def __init__(
        self,
        ray_actor_class_fqn: str,
        *args: Any,
        py_executable: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.ray_actor_class_fqn = ray_actor_class_fqn
        self.args = args
        self.kwargs = kwargs
        self._fields = checked_runtime_env(runtime_env, py_executable=py_executable)

    def __call__(
        self,
        placement_group: PlacementGroup | None,
        placement_group_bundle_index: int,
        num_gpus: float,
        bundle_indices: tuple[int, list[int]] | None = None,
        *,
        stopped: threading.Event | None = None,
        label: str | None = None,
        **extra_options: Any,
    ) -> ActorHandle:
        """Start one worker and wait until its constructor has returned.

        Args:
            placement_group, placement_group_bundle_index: the bundle to run in; None to let Ray choose a node.
            num_gpus: may be a fraction.
            bundle_indices: passed to the class's `configure_worker`.
            stopped: set it from another thread to abort the start.
            label: what messages call the worker; default: its `name`, if it has one.
            **extra_options: `py_executable`, `runtime_env`, `num_gpus_per_node` (for `configure_worker`), or Ray's.

        Raises:
            WorkerStartError, AttestationError: see `startup.await_started`; the worker is dead.
        """
        plan = self.plan(extra_options.pop("py_executable", None), extra_options.pop("runtime_env", None))
        num_gpus_per_node = extra_options.pop("num_gpus_per_node", None)
        # For a fraction of a GPU, Ray would reserve a whole CPU and keep other workers out of the bundle.
        fractional_cpu = {"num_cpus": num_gpus} if 0 < num_gpus < 1 else {}
        request = WorkerRequest(
            label or extra_options.get("name") or "without a name",
            placement_group,
            placement_group_bundle_index,
            ray_options={"num_gpus": num_gpus, **fractional_cpu, **extra_options},
            configure_arguments=configure_arguments(num_gpus, bundle_indices, num_gpus_per_node),
        )
        return self.start(plan, [request], stopped).handles[0]

    def create_worker_async(self, *args: Any, **kwargs: Any) -> Future[ActorHandle]:
        """Start one worker without blocking. Takes the arguments of a call; the future holds its result or error.

        The future cannot be cancelled: set `stopped`, and wait for the future before Ray is shut down.
        """
        return run_in_thread(lambda: self(*args, **kwargs), f"start {self.ray_actor_class_fqn}")

    def plan(
        self,
        py_executable: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        env_vars: Mapping[str, str] | None = None,
    ) -> LaunchPlan:
        """Make the venv ready and describe the class. See `launch_plan.plan_launch` for the errors."""
        group_fields = {"env_vars": checked_env_vars(env_vars)} if env_vars else {}
        call_fields = checked_runtime_env(runtime_env, py_executable=py_executable)
        plan = plan_launch(self.ray_actor_class_fqn, merged_runtime_env(self._fields, call_fields, group_fields))
        try:
            # `configure_worker` may add arguments later.
            is_partial = plan.description.configure_worker is not None
            plan.description.check_init_arguments(self.args, self.kwargs, is_partial)
        except WorkerStartError:
            # The cached description may be outdated. Only the class itself shows whether the arguments are wrong.
            return plan.refreshed()
        return plan

    def start(
        self, plan: LaunchPlan, requests: Sequence[WorkerRequest], stopped: threading.Event | None = None
    ) -> StartedWorkers:
        """Create all requested workers and wait for their constructors; repeat if the class has changed.

        Raises:
            WorkerStartError, AttestationError: see `startup.await_started`; all of the workers are dead.
            WorkerError: the class changes while it is being started.
        """
        for _ in range(_MAX_DESCRIPTIONS):
            handles: list[ActorHandle] = []
            try:
                configured = plan.configure([request.configure_arguments for request in requests])
                for request, result in zip(requests, configured, strict=True):
                    handles.append(self._create(plan, request, result))
                starting = [
                    StartingWorker(handle, plan.fqn, request.label, plan.secrets, request.node_id)
                    for handle, request in zip(handles, requests, strict=True)
                ]
                return StartedWorkers(plan, handles, await_started(starting, stopped=stopped))
            except StaleDescription as stale:
                logger.info("%s has changed since it was described; starting it again", plan.fqn)
                plan = plan.with_description(stale.description)
            except BaseException:
                kill_and_wait(handles)
                raise
        raise WorkerError(
            f"{plan.fqn} differed from its description {_MAX_DESCRIPTIONS} times: is its source being edited right now?"
        )

    def _create(self, plan: LaunchPlan, request: WorkerRequest, configured: ConfiguredWorker) -> ActorHandle:
        """Create the actor without waiting for it."""
        class_options = {k: v for k, v in plan.description.ray_options.items() if k not in _NOT_PER_ACTOR}
        options = WorkerOptions({**class_options, **request.ray_options}, plan.fields)
        options = options.with_configured(configured, plan.fqn)
        if configured.runtime_env:
            plan = _configured_plan(plan, options, configured)
        kwargs = {**self.kwargs, **options.init_kwargs}
        plan.description.check_init_arguments(self.args, kwargs)
        launch = {
            "fqn": plan.fqn,
            "env_vars": {**plan.host_env_vars, **request.env_vars},
            "expected": plan.python.expected,
            "description_digest": plan.description.digest,
        }
        actor_options = scheduled(options.ray, request.placement_group, request.bundle_index)
        return plan.actor_class.options(**actor_options, runtime_env=plan.runtime_env).remote(
            launch, *self.args, **kwargs
        )


def prepare_venvs(builders: Iterable[RayWorkerBuilder]) -> None:
    """Make the venvs of several builders ready on every node, in parallel, before their groups start.

    Without it, each group builds its venv when it is created, one after another. A `runtime_env` in a class's own
    `@ray.remote` is known only in its venv; packages that it adds are installed when the group is created.

    Raises:
        UnregisteredActorError, InvalidPyExecutableError, RuntimeEnvError, VenvError: a venv cannot be planned. Nothing
            has been built.
        NodeVenvError: a venv is not ready on some node.

    Example::

        trainer, verifier = RayWorkerBuilder("my_project.Trainer"), RayWorkerBuilder("my_project.Verifier")
        prepare_venvs([trainer, verifier])
        trainers = RayWorkerGroup(cluster, trainer)
        verifiers = RayWorkerGroup(cluster, verifier)
    """
    init_ray()
    prepare_venvs_of((builder.ray_actor_class_fqn, builder._fields) for builder in builders)


def _configured_plan(plan: LaunchPlan, options: WorkerOptions, configured: ConfiguredWorker) -> LaunchPlan:
    """Return the plan of a worker whose `configure_worker` returned variables or fields.

    The worker host sets those variables that need not be set earlier: with a different `runtime_env`, Ray cannot reuse
    the processes of its pool for the worker.
    """
    late = {name: value for name, value in configured.runtime_env.get("env_vars", {}).items() if not is_early(name)}
    early = {name: value for name, value in options.runtime_env.get("env_vars", {}).items() if name not in late}
    env_vars = {**plan.fields.get("env_vars", {}), **early}
    fields = {name: value for name, value in options.runtime_env.items() if name != "env_vars"}
    if env_vars:
        fields["env_vars"] = env_vars
    if fields != plan.fields:
        plan = plan.with_fields(fields)
    return replace(plan, host_env_vars={**plan.host_env_vars, **late})


def configure_arguments(
    num_gpus: float, bundle_indices: tuple[int, list[int]] | None, num_gpus_per_node: int | None
) -> dict[str, Any]:
    """Return the arguments of a class's `configure_worker`."""
    return {"num_gpus": num_gpus, "bundle_indices": bundle_indices, "num_gpus_per_node": num_gpus_per_node}
