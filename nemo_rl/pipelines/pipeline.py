"""Pipelines: stages in a row, each in the Python that it asks for, in one job.

::

    Pipeline.run ─▶ check names, needs, runtime_envs          nothing has been started
                 ─▶ stages that run in the driver list what there is to do
                 ─▶ Ray, resources                             (a finished run returns before this)
                 ─▶ all stages' venvs made ready, in parallel  by the venv engine; sealed and kept
                 ─▶ segments ─▶ results in the order of the input

    stages:    [list files]  read  repair  sign │ remove duplicates │ verify  write
    segments:   in driver    executor           │ one worker        │ executor
                                                 a GatherStage sees all tasks

Within a segment an executor moves tasks from stage to stage. What happens to a task is decided in one place, the
`StageRunner` in the stage's worker, so that all executors give the same result. Every task has a key that says where it
came from; keys put results in order, name a writer's shards, and let a repeated piece of work replace itself instead of
appearing twice. With a run directory what became of every task is recorded on disk, and a run that was killed goes on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines.stage import CompositeStage, expanded
from nemo_rl.pipelines.tasks import EmptyTask, Task

if TYPE_CHECKING:
    from nemo_rl.pipelines.executors.base import Executor
    from nemo_rl.pipelines.progress import ProgressListener
    from nemo_rl.pipelines.runner import OnFailure


class Pipeline:
    """Stages in a row.

    Args:
        name: for messages and the run's record.
        description: for people.
        stages: `ProcessingStage`s, `CompositeStage`s, or functions of one task.
        runtime_env: for all stages but those that run in the driver; a stage's own comes on top of it.
    """

    def __init__(
        self,
        name: str,
        description: str = "",
        stages: Sequence[Any] = (),
        *,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.description = description
        self.stages: list[Any] = list(stages)
        self.runtime_env = runtime_env

    def add_stage(self, stage: Any) -> Self:
        """Append a stage; returns the pipeline."""
        self.stages.append(stage)
        return self

    def describe(self) -> str:
        """The pipeline as text: every stage with what it needs, adds, holds and runs in."""
        lines = [f"Pipeline {self.name!r}" + (f": {self.description}" if self.description else "")]
        for number, stage in enumerate(expanded(self.stages), start=1):
            resources = stage.resources
            holds = [f"{resources.cpus:g} CPUs"]
            holds += [f"{resources.gpus:g} GPUs"] if resources.gpus else []
            holds += [f"{resources.gpu_memory_gb:g} GB of a GPU"] if resources.gpu_memory_gb else []
            lines.append(f"{number:3}. {stage.name} ({type(stage).__name__}): {', '.join(holds)}, batches of up to "
                         f"{stage.batch_size}")  # fmt: skip
            for word, (attributes, columns) in (("needs", stage.inputs()), ("adds", stage.outputs())):
                if attributes or columns:
                    lines.append(f"       {word} " + ", ".join([*attributes, *(f"column {c}" for c in columns)]))
            if stage.runs_in_driver:  # also when the pipeline has a runtime_env
                lines.append("       Python: the driver’s; runs in the driver")
                continue
            fields = {**(self.runtime_env or {}), **(stage.runtime_env or {})}
            shown = {k: sorted(v) if k == "env_vars" else v for k, v in fields.items()}  # values may be secrets
            lines.append(f"       Python: {shown or 'the driver’s'}")
        composite = [stage.name for stage in self.stages if isinstance(stage, CompositeStage)]
        if composite:
            lines.append(f"  expanded from {', '.join(composite)}")
        return "\n".join(lines)

    def run(
        self,
        executor: Executor | None = None,
        initial_tasks: Sequence[Task[Any]] | None = None,
        *,
        run_dir: str | os.PathLike[str] | None = None,
        on_failure: OnFailure | None = None,
        max_retries: int = 0,
        progress: ProgressListener | None = None,
    ) -> list[Task[Any]]:
        """Run the pipeline; returns what leaves the last stage, in the order of the input.

        Args:
            executor: default: `RayActorPoolExecutor()`.
            initial_tasks: default: one `EmptyTask`.
            run_dir: keeps what the run must not lose. The same call with the same directory goes on where a run that
                was killed stopped, and returns the result of one that is finished. On several nodes it must be on a
                file system that all of them share.
            on_failure: what to do when a task still raises after its retries: "stop", or "set_aside" to go on and keep
                the task with its traceback in `run_dir/failed`. Default: "set_aside" with a run_dir, else "stop". A
                `GatherStage` that raises always ends the run.
            max_retries: for stages that do not say themselves.
            progress: called every few seconds with the state of all stages.

        Raises:
            PipelineDefinitionError, RuntimeEnvError: the stages do not go together. Nothing has been started.
            ResumeError: `run_dir` belongs to another run.
            ResourceInsufficientError, VenvError, ClusterError: the cluster, or a stage's Python, cannot be had. No
                task has run.
            DataError: an input or output cannot be used.
            StageError: a stage failed.
        """
        from nemo_rl.pipelines.io.overlaps import refuse_overlaps, refuse_process_memory
        from nemo_rl.pipelines.run import RunOptions, run_pipeline

        if on_failure == "set_aside" and run_dir is None:
            raise PipelineDefinitionError("on_failure='set_aside' needs a run_dir: failed tasks are kept there")
        if on_failure not in (None, "stop", "set_aside"):
            raise PipelineDefinitionError(f"on_failure must be 'stop' or 'set_aside', not {on_failure!r}")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise PipelineDefinitionError(f"max_retries must be a whole number of at least 0, not {max_retries!r}")
        tasks: list[Task[Any]] = [EmptyTask()] if initial_tasks is None else list(initial_tasks)
        for task in tasks:
            if not isinstance(task, Task):
                raise PipelineDefinitionError(f"initial_tasks holds {task!r}, which is no Task")
        options = RunOptions(
            run_dir=run_dir,
            on_failure=on_failure or ("stop" if run_dir is None else "set_aside"),
            max_retries=max_retries,
            progress=progress,
        )
        stages = expanded(self.stages)
        keeps = [stage.name for stage in stages if stage.needs_run_dir()] if run_dir is None else []
        if keeps:
            raise PipelineDefinitionError(f"stage {keeps[0]!r} sets records aside and needs a run_dir to keep them")
        refuse_process_memory(stages)
        refuse_overlaps(stages, run_dir)
        return run_pipeline(self, stages, executor, tasks, options)
