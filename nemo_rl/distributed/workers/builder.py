"""Starting one worker: a Ray actor that runs in its class's own venv."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from nemo_rl.distributed.workers.launch_plan import (
    IsolatedWorkerInitializer,
    LaunchPlan,
    configure_workers,
    plan_launch,
)
from nemo_rl.distributed.workers.runtime_env import (
    Configured,
    WorkerOptions,
    checked_env_vars,
    checked_runtime_env,
    is_early,
    merged_runtime_env,
    scheduled,
    with_configured,
)
from nemo_rl.distributed.workers.startup import StaleDescription, StartingWorker, await_started
from nemo_rl.errors import RuntimeEnvError, WorkerError, WorkerStartError

# A class that differs from its description more often than this changes while it is being started.
MAX_DESCRIPTIONS = 3
# Options of a class that Ray does not take per actor, or that the plan holds already.
_NOT_PER_ACTOR = ("runtime_env", "concurrency_groups")


class RayWorkerBuilder:
    """How to start a worker class, named by its FQN, in its own venv.

    Args:
        ray_actor_class_fqn: `package.module.Class`; a plain class or one with `@ray.remote`.
        *args: for the class's constructor, in the worker.
        **kwargs: the same.
        py_executable: instead of what the registry says for the class.
        runtime_env: fields of Ray's `RuntimeEnv` for all workers of this builder.

    Calls may override `py_executable` and `runtime_env`, and take any other of Ray's actor options.
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
        self._fields = _fields(py_executable, runtime_env)

    def plan(
        self,
        py_executable: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        env_vars: Mapping[str, str] | None = None,
    ) -> LaunchPlan:
        """Make the venv ready and describe the class; see `worker_launch.plan_launch` for the errors."""
        of_group = {"env_vars": checked_env_vars(env_vars)} if env_vars else {}
        fields = merged_runtime_env(self._fields, _fields(py_executable, runtime_env), of_group)
        plan = plan_launch(self.ray_actor_class_fqn, fields)
        try:
            # `configure_worker` may add arguments later.
            is_partial = plan.description.configure_worker is not None
            plan.description.check_init_arguments(self.args, self.kwargs, is_partial)
        except WorkerStartError:
            # A kept description may be older than the class: whether the arguments are wrong, only the class can tell.
            return plan.described_anew()
        return plan

    def __call__(
        self,
        placement_group: PlacementGroup | None,
        placement_group_bundle_index: int,
        num_gpus: float,
        bundle_indices: tuple[int, list[int]] | None = None,
        *,
        stopped: threading.Event | None = None,
        **extra_options: Any,
    ) -> ActorHandle:
        """Start one worker and wait until its constructor has returned.

        Args:
            placement_group, placement_group_bundle_index: where; None for wherever Ray likes.
            num_gpus: may be a fraction.
            bundle_indices: passed on to the class's `configure_worker`.
            stopped: set it from another thread to give up a start that is under way.
            **extra_options: `py_executable`, `runtime_env`, `num_gpus_per_node` (for `configure_worker`), or Ray's.

        Raises:
            WorkerStartError, AttestationError: see `worker_start.await_started`; the worker is dead by then.
        """
        python_options = {name: extra_options.pop(name, None) for name in ("py_executable", "runtime_env")}
        call = configure_call(num_gpus, bundle_indices, extra_options.pop("num_gpus_per_node", None))
        plan = self.plan(**python_options)
        for _ in range(MAX_DESCRIPTIONS):
            configured = configure_workers(plan, [call])[0]
            options = {"num_gpus": num_gpus, **_fractional_cpu(num_gpus), **extra_options}
            handle = self.submit(plan, placement_group, placement_group_bundle_index, options, configured)
            try:
                label = extra_options.get("name") or "without a name"
                await_started([StartingWorker(handle, plan.fqn, label, plan.secrets)], stopped=stopped)
            except StaleDescription as stale:
                plan = plan.redescribed(stale.description)
            else:
                return handle
        raise WorkerError(keeps_changing(self.ray_actor_class_fqn))

    def create_worker_async(self, *args: Any, **kwargs: Any) -> Future[ActorHandle]:
        """Start one worker without blocking. Takes what a call takes; the future holds its result or its error.

        The future cannot be cancelled: set `stopped`, and wait for it before Ray is shut down.
        """
        future: Future[ActorHandle] = Future()
        future.set_running_or_notify_cancel()

        def start() -> None:
            try:
                future.set_result(self(*args, **kwargs))
            except BaseException as error:  # whatever it is, it belongs to whoever asks for the result
                future.set_exception(error)

        threading.Thread(target=start, name=f"start {self.ray_actor_class_fqn}", daemon=True).start()
        return future

    def submit(
        self,
        plan: LaunchPlan,
        placement_group: PlacementGroup | None,
        placement_group_bundle_index: int,
        ray_options: Mapping[str, Any],
        configured: Configured = (None, None, None, None),
        env_vars: Mapping[str, str] | None = None,
    ) -> ActorHandle:
        """Create the actor without waiting for it.

        Args:
            ray_options: Ray's actor options as the caller gives them.
            configured: what `configure_worker` returned for this worker.
            env_vars: of this worker alone (RANK and the like), set before the worker's module is imported.
        """
        of_class = {k: v for k, v in plan.description.ray_options.items() if k not in _NOT_PER_ACTOR}
        options = with_configured(WorkerOptions({**of_class, **ray_options}, plan.fields), configured, plan.fqn)
        host_env_vars = dict(plan.host_env_vars)
        if configured[1] or configured[3]:
            plan, late = _own_plan(plan, options, configured)
            host_env_vars = {**plan.host_env_vars, **late}
        host_env_vars.update(env_vars or {})
        kwargs = {**self.kwargs, **options.init_kwargs}
        plan.description.check_init_arguments(self.args, kwargs)
        launch = {
            "fqn": plan.fqn,
            "env_vars": host_env_vars,
            "expected": plan.python.expected,
            "description_digest": plan.description.digest,
        }
        actor_options = scheduled(options.ray, placement_group, placement_group_bundle_index)
        return plan.actor_class.options(**actor_options, runtime_env=plan.runtime_env).remote(
            launch, *self.args, **kwargs
        )


def _fields(py_executable: str | None, runtime_env: Mapping[str, Any] | None) -> dict[str, Any]:
    """`runtime_env` with `py_executable` as one of its fields."""
    fields = checked_runtime_env(runtime_env)
    if py_executable is None:
        return fields
    if fields.get("py_executable", py_executable) != py_executable:
        raise RuntimeEnvError(
            f"py_executable={py_executable!r} and runtime_env['py_executable']={fields['py_executable']!r} cannot both "
            "hold. Keep one."
        )
    return checked_runtime_env({**fields, "py_executable": py_executable})


def _own_plan(plan: LaunchPlan, options: WorkerOptions, configured: Configured) -> tuple[LaunchPlan, dict[str, str]]:
    """The plan of a worker whose `configure_worker` returned variables or fields, and what its host sets for it.

    Variables that can wait for the host do: a `runtime_env` of its own costs the worker Ray's pool of processes.
    """
    from_class = merged_runtime_env(configured[3], {"env_vars": configured[1]}).get("env_vars", {})
    late = {name: value for name, value in from_class.items() if not is_early(name)}
    fields = dict(options.runtime_env)
    kept = {name: value for name, value in fields.get("env_vars", {}).items() if name not in late}
    fields["env_vars"] = {**plan.fields.get("env_vars", {}), **kept}
    fields = {name: value for name, value in fields.items() if value or name != "env_vars"}
    return (plan if fields == plan.fields else plan.with_fields(fields)), late


def configure_call(
    num_gpus: float, bundle_indices: tuple[int, list[int]] | None, num_gpus_per_node: int | None
) -> dict[str, Any]:
    """The arguments of a class's `configure_worker`."""
    return {"num_gpus": num_gpus, "bundle_indices": bundle_indices, "num_gpus_per_node": num_gpus_per_node}


def _fractional_cpu(num_gpus: float) -> dict[str, float]:
    # Ray would ask for a whole CPU for an actor with a part of a GPU, and keep others out of the bundle.
    return {"num_cpus": num_gpus} if 0 < num_gpus < 1 else {}


def keeps_changing(fqn: str) -> str:
    """The message for a class that never matches its description."""
    return f"{fqn} differed from its description {MAX_DESCRIPTIONS} times: is its source being edited right now?"
