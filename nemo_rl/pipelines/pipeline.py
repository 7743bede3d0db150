"""Defines pipelines: sequences of stages that run in one job, each in the Python that it asks for.

::

    Pipeline.run ─▶ check names, needs, runtime_envs          nothing has been started
                 ─▶ run the leading stages in the driver       they list the input
                 ─▶ Ray, resources                             (a finished run returns before this)
                 ─▶ build all stages' venvs in parallel        with the venv engine; sealed and reused
                 ─▶ segments ─▶ results in the order of the input

    stages:    [list files]  read  repair  sign │ remove duplicates │ verify  write
    segments:   in driver    executor           │ one worker        │ executor
                                                 a GatherStage sees all tasks

Within a segment, an executor moves tasks from stage to stage. The `StageRunner` in the stage's worker decides what a
task becomes, so all executors give the same result. Every task has a key that records its origin. Keys order the
results and name a writer's shards, so repeated work replaces its earlier output instead of duplicating it. With a run
directory, the outcome of every task is recorded on disk, and a run that was killed can be resumed.
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
    """Runs tasks through a sequence of stages.

    Example::

        stages = [JsonlReader("raw.jsonl"), TextFilter("text", min_chars=20), JsonlWriter("out")]
        pipeline = Pipeline("clean", stages=stages)
        print(pipeline.describe())
        results = pipeline.run(run_dir="results/clean")

    Args:
        name: shown in messages and stored in the run's record.
        description: free text for `describe`.
        stages: `ProcessingStage`s, `CompositeStage`s, or functions of one task.
        runtime_env: fields of Ray's `RuntimeEnv` for all stages, except those that run in the driver. A stage's own
            `runtime_env` takes precedence.
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
        """Append a stage and return the pipeline."""
        self.stages.append(stage)
        return self

    def describe(self) -> str:
        """Return the pipeline as text: the inputs, outputs, resources and Python of each stage."""
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
        """Run the pipeline and return the results of the last stage, in the order of the input.

        Args:
            executor: defaults to `RayActorPoolExecutor()`.
            initial_tasks: defaults to one `EmptyTask`.
            run_dir: directory for the run's state. The same call with the same directory resumes a run that was killed,
                and returns the result of a run that is finished. With several nodes, it must be on a file system that
                all of them share.
            on_failure: what to do with a task that still raises after its retries. "stop" ends the run. "set_aside"
                stores the task and its traceback in `run_dir/failed` and continues. Defaults to "set_aside" with a
                `run_dir`, else to "stop". A `GatherStage` that raises always ends the run.
            max_retries: retries per task, for stages that do not set `max_retries`.
            progress: called every few seconds with the state of all stages.

        Raises:
            PipelineDefinitionError, RuntimeEnvError: the stages do not fit together. Nothing has been started.
            ResumeError: `run_dir` belongs to another run.
            ResourceInsufficientError, VenvError, ClusterError: the cluster lacks resources, or a stage's Python cannot
                be provided. No task has run.
            DataError: an input cannot be read, or an output cannot be written.
            StageError: a stage failed.
        """
        from nemo_rl.pipelines.executors.actor_pool import RayActorPoolExecutor
        from nemo_rl.pipelines.io.overlaps import refuse_overlaps, refuse_process_memory
        from nemo_rl.pipelines.run import RunRequest, run_pipeline

        if on_failure == "set_aside" and run_dir is None:
            raise PipelineDefinitionError("on_failure='set_aside' needs a run_dir, where failed tasks are stored")
        if on_failure not in (None, "stop", "set_aside"):
            raise PipelineDefinitionError(f"on_failure must be 'stop' or 'set_aside', not {on_failure!r}")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise PipelineDefinitionError(f"max_retries must be an integer of at least 0, not {max_retries!r}")
        tasks: list[Task[Any]] = [EmptyTask()] if initial_tasks is None else list(initial_tasks)
        for task in tasks:
            if not isinstance(task, Task):
                raise PipelineDefinitionError(f"initial_tasks holds {task!r}, which is not a Task")
        stages = expanded(self.stages)
        lacking = [stage.name for stage in stages if stage.needs_run_dir()] if run_dir is None else []
        if lacking:
            raise PipelineDefinitionError(f"stage {lacking[0]!r} sets records aside and needs a run_dir to store them")
        refuse_process_memory(stages)
        refuse_overlaps(stages, run_dir)
        request = RunRequest(
            name=self.name,
            stages=stages,
            runtime_env=self.runtime_env,
            executor=executor or RayActorPoolExecutor(),
            run_dir=run_dir,
            on_failure=on_failure or ("stop" if run_dir is None else "set_aside"),
            max_retries=max_retries,
            progress=progress,
        )
        return run_pipeline(request, tasks)
