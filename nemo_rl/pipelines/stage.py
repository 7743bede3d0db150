"""Defines stages, which process the tasks of a pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeAlias, TypeVar

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines.tasks import Task

In = TypeVar("In", bound=Task[Any])
Out = TypeVar("Out", bound=Task[Any])
AnyStage: TypeAlias = "ProcessingStage[Any, Any]"
# What `process` may return.
Returned: TypeAlias = Task[Any] | list[Any] | None

# In `outputs`, stands for columns that a stage cannot name before it has seen the data.
ANY_COLUMN = "*"


@dataclass(frozen=True)
class Resources:
    """Declares the resources of one worker of a stage.

    Example:
        >>> Resources(cpus=0.5)
        Resources(cpus=0.5, gpus=0.0, gpu_memory_gb=0.0)

    Attributes:
        cpus, gpus: may be fractions.
        gpu_memory_gb: share of one GPU, in GB of its memory. Use it instead of `gpus`.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    gpu_memory_gb: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus", "gpu_memory_gb"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise PipelineDefinitionError(f"Resources({name}={value!r}): expected a number of at least 0")
        if self.gpus and self.gpu_memory_gb:
            raise PipelineDefinitionError("Resources: give either gpus or gpu_memory_gb, not both")


class Reporter(Protocol):
    """Receives what a running stage drops and sets aside."""

    def dropped(self, reason: str, count: int, examples: Sequence[Mapping[str, Any]]) -> None: ...
    def set_aside(self, records: Sequence[Mapping[str, Any]]) -> None: ...


class ProcessingStage(Generic[In, Out]):
    """Processes tasks as one step of a pipeline. Subclass it and define `process`, or `process_batch` for batches.

    The stage is pickled and sent to its workers, which run in the stage's Python. Create expensive objects and objects
    that cannot be pickled in `setup`. Import libraries that only the stage's Python has in `setup` or `process`.

    Example::

        class Shout(ProcessingStage[DocumentBatch, DocumentBatch]):
            def inputs(self):
                return ["data"], ["text"]

            def process(self, task):
                frame = task.to_pandas()
                return task.with_data(frame.assign(text=frame["text"].str.upper()))

    Class attributes, which `with_` changes in a copy:
        name: unique in its pipeline. Defaults to the name of the class.
        resources: resources of one worker.
        batch_size: maximum number of tasks per call of `process_batch`.
        runtime_env: fields of Ray's `RuntimeEnv`. None uses the driver's Python, without extra cost.
        num_workers: number of workers. None uses as many as the cluster can run and the number of tasks justifies.
        max_retries: retries for a task that raises. None uses the value of the run.
    """

    name: str = ""
    resources: Resources = Resources()
    batch_size: int = 1
    runtime_env: Mapping[str, Any] | None = None
    num_workers: int | None = None
    max_retries: int | None = None

    # Whether the stage runs in the driver, before anything else starts. For leading stages that only list the input.
    # Such a stage ignores the pipeline's `runtime_env`, and must not set `runtime_env`, `resources` or `num_workers`.
    runs_in_driver: ClassVar[bool] = False
    _reporter: Reporter | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def inputs(self) -> tuple[list[str], list[str]]:
        """Return the (attributes, columns) that a task must have. Checked before the run and for every task."""
        return [], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Return the (attributes, columns) that the stage adds. Include `ANY_COLUMN` if columns depend on the data."""
        return [], []

    def prepare(self, resumes: bool) -> None:
        """Check paths and other options. Called in the driver before anything starts.

        Args:
            resumes: whether an earlier attempt of the same run may have left files behind.
        """

    def needs_run_dir(self) -> bool:
        """Return whether the stage may set records aside. If so, the run must have a `run_dir`."""
        return False

    def reads_from(self) -> list[str]:
        """Return the files and directories that the stage reads. No stage of the pipeline may write to them."""
        return []

    def would_read(self, place: str) -> bool:
        """Return whether the stage would read a file, given by its real path or URL, if the file existed."""
        return False

    def writes_to(self) -> list[str]:
        """Return the files that the stage writes, and the directories that only it writes to, with a trailing slash."""
        return []

    def setup_on_node(self) -> None:
        """Prepare a node, for example with downloads. Called once per node and run, before the first `setup`."""

    def setup(self) -> None:
        """Prepare a worker. Called once per worker, before its first task."""

    def process(self, task: In) -> Returned:
        """Process one task. Returns a task, a list of tasks, or None to drop the task."""
        raise NotImplementedError(f"{type(self).__name__} has neither process nor process_batch")

    def process_batch(self, tasks: list[In]) -> list[Any]:
        """Process up to `batch_size` tasks. Returns a list with one entry per task, each as returned by `process`.

        A list of another length holds the results of the batch as a whole. This is supported only in runs with neither
        a `run_dir` nor a `GatherStage`, because those track each task; they raise `StageOutputError`. Use a
        `GatherStage` to merge tasks.
        """
        return [self.process(task) for task in tasks]

    def teardown(self) -> None:
        """Release a worker's resources. Called after its last task, unless the worker is killed; never by Xenna."""

    def with_(self, **changes: Any) -> Self:
        """Return a copy with other values of the documented class attributes.

        Raises:
            PipelineDefinitionError: an attribute is unknown.
        """
        result = copy.copy(self)
        for name, value in checked_changes(self.name, changes).items():
            setattr(result, name, value)
        return result

    def dropped(self, reason: str, count: int = 1, examples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Report to the run how many documents the stage drops and why, with a few examples."""
        if count and self._reporter is not None:
            self._reporter.dropped(reason, count, examples)

    def set_aside(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Store records that cannot be processed in the run's `failed/` directory, as JSON lines.

        Without a `run_dir`, they are deleted when the run ends; see `needs_run_dir`.
        """
        if records and self._reporter is not None:
            self._reporter.set_aside(records)


_CHANGEABLE = ("name", "resources", "batch_size", "runtime_env", "num_workers", "max_retries")


def checked_changes(stage: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `changes` if `with_` supports all of them, else raise `PipelineDefinitionError`."""
    for name in changes:
        if name not in _CHANGEABLE:
            raise PipelineDefinitionError(f"stage {stage!r}: with_({name}=...) is unknown. Known: {_CHANGEABLE}")
    return dict(changes)


class GatherStage(ProcessingStage[In, Out]):
    """Processes all tasks of the pipeline at once, for example to remove duplicates across a data set.

    One worker processes all tasks. They are stored on disk, so neither the worker nor the driver holds them in memory.
    Setting `batch_size`, `num_workers` or `max_retries` is an error. An exception in `process_all` always ends the run,
    even with `on_failure="set_aside"`, because it cannot be assigned to one task. If the worker dies, the stage is
    restarted once.
    """

    def process_all(self, tasks: Sequence[In]) -> Any:
        """Yield the resulting tasks.

        Args:
            tasks: all tasks, in the order of the pipeline's input. Each is read from disk on access.
        """
        raise NotImplementedError(f"{type(self).__name__} has no process_all")


class CompositeStage(ProcessingStage[In, Out]):
    """Groups several stages under one name. Subclass it and define `decompose`."""

    def decompose(self) -> list[Any]:
        """Return the stages of the group. They may include functions and other composite stages."""
        raise NotImplementedError(f"{type(self).__name__} has no decompose")

    def with_(self, **changes: Any) -> Self:
        """Return a copy. Apart from `name`, changes apply to each stage of the group that supports them."""
        result = copy.copy(self)
        changes = checked_changes(self.name, changes)
        result.name = changes.pop("name", self.name)
        result._changes = {**getattr(self, "_changes", {}), **changes}
        return result

    _changes: Mapping[str, Any] = {}


class FunctionStage(ProcessingStage[Task[Any], Task[Any]]):
    """Wraps a function of one task as a stage. By default it may add any column."""

    def __init__(
        self,
        function: Callable[[Any], Returned],
        *,
        inputs: tuple[list[str], list[str]] = ([], []),
        outputs: tuple[list[str], list[str]] = (["data"], [ANY_COLUMN]),
        **options: Any,
    ) -> None:
        name = getattr(function, "__name__", type(function).__name__)
        self._function, self._inputs, self._outputs = function, inputs, outputs
        self.name = name
        for key, value in checked_changes(name, options).items():
            setattr(self, key, value)

    def inputs(self) -> tuple[list[str], list[str]]:
        return self._inputs

    def outputs(self) -> tuple[list[str], list[str]]:
        return self._outputs

    def process(self, task: Task[Any]) -> Returned:
        return self._function(task)


def processing_stage(**options: Any) -> Callable[[Callable[[Any], Returned]], FunctionStage]:
    """Decorate a function to turn it into a stage.

    Takes the arguments of `with_`, and `inputs` and `outputs`.

    Example:
        >>> @processing_stage(name="count", outputs=([], ["length"]))
        ... def count(task):
        ...     frame = task.to_pandas()
        ...     return task.with_data(frame.assign(length=frame["text"].str.len()))
        >>> count.name
        'count'
    """

    def decorate(function: Callable[[Any], Returned]) -> FunctionStage:
        return FunctionStage(function, **options)

    return decorate


def unsupported_attributes(stage: AnyStage) -> dict[str, tuple[Any, ...]]:
    """Return the attributes that a stage does not support, each with its permitted default values."""
    if stage.runs_in_driver:
        return {"runtime_env": (None, {}), "num_workers": (None, 1), "resources": (Resources(),)}
    if isinstance(stage, GatherStage):
        return {"batch_size": (1,), "num_workers": (None, 1), "max_retries": (None, 0)}
    return {}


def _changed(stage: AnyStage, changes: Mapping[str, Any]) -> AnyStage:
    """Apply a composite stage's changes to one of its stages, as far as that stage supports them."""
    supported = {name: value for name, value in changes.items() if name not in unsupported_attributes(stage)}
    return stage.with_(**supported) if supported else stage


def expanded(stages: Sequence[Any]) -> list[AnyStage]:
    """Return all stages as `ProcessingStage`s: wrap functions, and replace composite stages by their parts.

    Raises:
        PipelineDefinitionError: an element is not a stage.
    """
    result: list[AnyStage] = []
    for stage in stages:
        if isinstance(stage, CompositeStage):
            parts = expanded(stage.decompose())
            result += [_changed(part, stage._changes) for part in parts]
        elif isinstance(stage, ProcessingStage):
            result.append(stage)
        elif callable(stage) and not inspect.isclass(stage):
            result.append(FunctionStage(stage))
        else:
            hint = " (a class: pass an instance)" if inspect.isclass(stage) else ""
            raise PipelineDefinitionError(
                f"{stage!r}{hint} is not a stage: expected a ProcessingStage, CompositeStage or function of one task"
            )
    return result
