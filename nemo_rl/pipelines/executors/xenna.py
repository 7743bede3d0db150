"""Runs all stages at once on cosmos-xenna (the extra `xenna`), which streams tasks and scales workers automatically.

Xenna supports conda environments and variables for a stage. All other fields of its `RuntimeEnv` pass through one
method, which is overridden here, so that workers start in the Python of the venv engine. Xenna's own actor runs in that
Python too: a stage whose `py_executable` is another project needs cosmos-xenna in that project.

Xenna accounts for CPUs and GPUs itself, not through Ray, so nothing else should run on the cluster at the same time. It
does not restart a worker that died: its job ends, and the run starts another one for the unfinished inputs. Its stages
have no hook for their end, so `teardown` is not called. All uses of Xenna's private modules are in this file (checked
with cosmos-xenna 0.3).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from nemo_rl.distributed.provisioning.remote_calls import start_on_nodes
from nemo_rl.distributed.ray_private import actor_states
from nemo_rl.errors import PipelineError, StageError
from nemo_rl.pipelines.executors.base import (
    Cluster,
    PlannedStage,
    WorkersDied,
    cpu_share,
    import_optional,
    is_death,
    recorded_error,
    require_gpus_together,
    stage_error,
)
from nemo_rl.pipelines.items import Item, chunks, group_size
from nemo_rl.pipelines.stage import AnyStage
from nemo_rl.utils.processes import program_of

logger = logging.getLogger(__name__)

_NEVER_S = 1e9
_KILL_TIMEOUT_S = 30.0
# Seconds between two scaling decisions. Xenna's default of three minutes suits jobs that run for hours.
_AUTOSCALE_INTERVAL_S = 10.0


class XennaExecutor:
    """Runs all stages at once on Xenna, which scales the number of workers per stage.

    Example::

        pipeline.run(XennaExecutor(cpu_share=0.9), run_dir="results/clean")

    Args:
        autoscale_interval_s: seconds between two scaling decisions.
        cpu_share: share of the cluster's CPUs for the stages. The rest is for Ray and the driver.

    Raises:
        PipelineDefinitionError: cosmos-xenna is not installed.
    """

    def __init__(self, *, autoscale_interval_s: float = _AUTOSCALE_INTERVAL_S, cpu_share: float = 1.0) -> None:
        import_optional("cosmos_xenna", "xenna")
        self._interval_s = autoscale_interval_s
        self._cpu_share = cpu_share

    def check_capacity(self, wanted: Sequence[tuple[AnyStage, tuple[float, float]]], cluster: Cluster) -> None:
        """Check that the cluster has GPUs for all stages together. See `Executor.check_capacity`."""
        require_gpus_together(wanted, cluster, "Xenna")

    def run(self, stages: Sequence[PlannedStage], items: Sequence[Item], cluster: Cluster) -> list[Item]:
        """See `Executor.run`."""
        from cosmos_xenna.pipelines import v1 as xenna

        if not items:
            return []
        share = cpu_share(stages, cluster.num_cpus * self._cpu_share)
        size = group_size(len(items), cluster.num_cpus, stages[0].batch_size)
        quiet = xenna.VerbosityLevel.NONE
        config = xenna.PipelineConfig(
            execution_mode=xenna.ExecutionMode.STREAMING,
            return_last_stage_outputs=True,
            logging_interval_s=_NEVER_S,
            enable_work_stealing=True,
            cpu_allocation_percentage=self._cpu_share,
            actor_pool_verbosity_level=quiet,
            monitoring_verbosity_level=quiet,
            mode_specific=xenna.StreamingSpecificSpec(
                autoscale_interval_s=self._interval_s, executor_verbosity_level=quiet
            ),
        )
        specification = xenna.PipelineSpec(
            input_data=list(chunks(items, size)),
            stages=[xenna.StageSpec(_stage(stage, share), num_workers=stage.job.stage.num_workers) for stage in stages],
            config=config,
        )
        try:
            with _monitoring_off(), _actors_killed_at_exit():
                groups = xenna.run_pipeline(specification) or []
        except Exception as error:  # Xenna raises RuntimeError and passes on Ray's errors
            cause = recorded_error(stages[0].job) or stage_error(error)
            if cause is not None:
                raise cause from error
            if is_death(error):
                raise WorkersDied(StageError(f"a worker of a stage died: {error}")) from error
            if "StageWorker" in str(error):
                raise StageError(f"a worker of a stage failed: {error}") from error
            raise PipelineError(f"Xenna failed: {type(error).__name__}: {error}") from error
        return [item for group in groups for item in group]


@contextmanager
def _monitoring_off() -> Iterator[None]:
    """Stop Xenna's monitoring from querying Ray's dashboard for all actors. Our clusters have no dashboard."""
    from cosmos_xenna.pipelines.private import monitoring

    before = monitoring.get_ray_actors
    monitoring.get_ray_actors = lambda *_: []
    try:
        yield
    finally:
        monitoring.get_ray_actors = before


@contextmanager
def _actors_killed_at_exit() -> Iterator[None]:
    """Kill the processes of this job's Xenna actors when the block ends.

    Xenna's threads keep the process of an actor alive after Ray has killed the actor, even after the cluster stopped.
    Actors of other jobs on the cluster are not touched.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    before = set(actor_states(job))
    try:
        yield
    finally:
        pids_by_node: dict[str, list[int]] = {}
        for actor_id, info in actor_states(job).items():
            if actor_id not in before and info["Pid"]:
                pids_by_node.setdefault(info["Address"]["NodeID"], []).append(info["Pid"])
        arguments = {node_id: (pids,) for node_id, pids in pids_by_node.items()}
        tasks = list(start_on_nodes(_kill_processes, arguments).values())
        ray.wait(tasks, num_returns=len(tasks), timeout=_KILL_TIMEOUT_S) if tasks else None


def _kill_processes(pids: list[int]) -> None:
    """Kill the processes that are still Xenna's. The system may have reused a process id."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if program_of(pid).startswith(("ray::StageWorker", "ray::NodeResourceMonitor", "ray::Stage ")):
                os.kill(pid, signal.SIGKILL)


def _stage(planned: PlannedStage, share: float) -> Any:
    """Wrap a stage for Xenna. The classes are defined in this function, so that they are pickled by value."""
    import attrs
    from cosmos_xenna.pipelines import v1 as xenna

    arguments = planned.constructor_arguments
    # The classes below are pickled with these values. They must not refer to `planned`: the worker cannot import the
    # module of its stage before the search path is set.
    runtime_env = dict(planned.runtime_env)
    wanted = xenna.Resources(cpus=planned.num_cpus * share, gpus=planned.num_gpus)

    @attrs.define
    class ReadyPython(xenna.RuntimeEnv):
        fields: dict = attrs.field(factory=dict)

        def to_ray_runtime_env(self) -> Any:
            from ray.runtime_env import RuntimeEnv

            env_vars = {**self.fields.get("env_vars", {}), **self.extra_env_vars}
            return RuntimeEnv(**{**self.fields, "env_vars": env_vars})

    class XennaStage(xenna.Stage):
        worker: Any = None
        failed_start: Exception | None = None

        @property
        def required_resources(self) -> Any:
            return wanted

        @property
        def env_info(self) -> Any:
            return ReadyPython(fields=runtime_env)

        def setup(self, worker_metadata: Any) -> None:
            from ray import cloudpickle

            worker_class, arguments = cloudpickle.loads(self.worker_bytes)
            self.worker = worker_class(*arguments)
            from nemo_rl.utils.parent_watch import exit_with_parent  # the worker has set the search path

            exit_with_parent()  # Xenna's threads outlive a killed driver and its cluster
            try:
                self.worker.start()
            except Exception as error:
                self.failed_start = error

        def process_data(self, in_data: list[Any]) -> list[Any] | None:
            if self.failed_start is not None:
                raise self.failed_start
            *groups, _sizes = self.worker.run(*in_data)
            return groups

    from ray import cloudpickle

    from nemo_rl.pipelines.bootstrap import StageWorker

    stage = XennaStage()
    # Pickled to bytes, so that nothing is imported before the worker has the driver's search path.
    stage.worker_bytes = cloudpickle.dumps((StageWorker, arguments))
    return stage
