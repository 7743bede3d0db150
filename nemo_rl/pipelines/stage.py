"""Stages: what a pipeline does to its tasks."""

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

# Among the columns that a stage says it produces: it cannot know them before it has seen the data.
ANY_COLUMN = "*"


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage holds.

    Attributes:
        cpus, gpus: may be fractions.
        gpu_memory_gb: a share of one GPU, in GB of its memory, instead of `gpus`.
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
    """Where a running stage tells what it left out."""

    def dropped(self, reason: str, count: int, examples: Sequence[Mapping[str, Any]]) -> None: ...
    def set_aside(self, records: Sequence[Mapping[str, Any]]) -> None: ...


class ProcessingStage(Generic[In, Out]):
    """One step of a pipeline. Subclass it and write `process` (or `process_batch`, to see several tasks at once).

    The object is pickled and sent to each of its workers, which run in the stage's own Python. What is expensive or
    cannot be pickled belongs into `setup`, and so does the import of libraries that only the stage's Python has.

    Class attributes, all of which `with_` changes in a copy:
        name: unique in its pipeline; default: the name of the class.
        resources: of one worker.
        batch_size: at most so many tasks are given to `process_batch` at once.
        runtime_env: fields of Ray's `RuntimeEnv`; None: the driver's Python, at no extra cost.
        num_workers: how many; None: as many as the cluster has room for and the tasks are worth.
        max_retries: how often a task that raised is tried again; None: as the run says.
    """

    name: str = ""
    resources: Resources = Resources()
    batch_size: int = 1
    runtime_env: Mapping[str, Any] | None = None
    num_workers: int | None = None
    max_retries: int | None = None

    # Run in the driver, before anything else: for leading stages that only list what there is to do. It runs in the
    # driver's Python, also when the pipeline has a `runtime_env`; one of its own, `resources` and `num_workers` are
    # refused.
    runs_in_driver: ClassVar[bool] = False
    _reporter: Reporter | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def inputs(self) -> tuple[list[str], list[str]]:
        """What a task must have: (attributes, columns of its data). Checked before the run, and again per task."""
        return [], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """What the stage adds: (attributes, columns). Include `ANY_COLUMN` where columns depend on the data."""
        return [], []

    def prepare(self, resumes: bool) -> None:
        """Called in the driver before anything starts: raise what is wrong with paths and the like.

        Args:
            resumes: an earlier attempt of the same run may have left something behind.
        """

    def needs_run_dir(self) -> bool:
        """Whether what it sets aside would be lost without a `run_dir`: a run without one is then refused."""
        return False

    def reads_from(self) -> list[str]:
        """Files and directories that the stage reads. No writer of the pipeline may write, or empty, any of them."""
        return []

    def would_read(self, place: str) -> bool:
        """Whether the stage would read a file (its real path, or URL) if it were there."""
        return False

    def writes_to(self) -> list[str]:
        """Files that the stage writes, and directories that it has for itself, which end with a slash."""
        return []

    def setup_on_node(self) -> None:
        """Called once per node and run, before the first `setup` there: downloads and the like."""

    def setup(self) -> None:
        """Called once per worker, before its first task."""

    def process(self, task: In) -> Returned:
        """Turn one task into a task, a list of tasks, or None (it is dropped)."""
        raise NotImplementedError(f"{type(self).__name__} has neither process nor process_batch")

    def process_batch(self, tasks: list[In]) -> list[Any]:
        """Turn up to `batch_size` tasks into a list with one entry per task, each what `process` may return.

        A list of another length is taken as the results of the batch as a whole, in a run with neither a `run_dir` nor
        a `GatherStage`. Those must know of every task when it is done, which nobody could say of one that is in a
        result together with others: they end with a `StageOutputError`. A `GatherStage` may make one task of many.
        """
        return [self.process(task) for task in tasks]

    def teardown(self) -> None:
        """Called once per worker, after its last task; not when the worker is killed, and never by Xenna."""

    def with_(self, **changes: Any) -> Self:
        """A copy with other values of the attributes that the class documents.

        Raises:
            PipelineDefinitionError: a name that is none of them.
        """
        result = copy.copy(self)
        for name, value in checked_changes(self.name, changes).items():
            setattr(result, name, value)
        return result

    def dropped(self, reason: str, count: int = 1, examples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Tell the run's report how many documents this stage leaves out and why, with a few of them."""
        if count and self._reporter is not None:
            self._reporter.dropped(reason, count, examples)

    def set_aside(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep records that cannot be processed in the run's `failed/`, as JSON lines.

        Without a `run_dir` they are gone when the run ends; see `needs_run_dir`.
        """
        if records and self._reporter is not None:
            self._reporter.set_aside(records)


_CHANGEABLE = ("name", "resources", "batch_size", "runtime_env", "num_workers", "max_retries")


def checked_changes(stage: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes`, if `with_` knows all of them."""
    for name in changes:
        if name not in _CHANGEABLE:
            raise PipelineDefinitionError(f"stage {stage!r}: with_({name}=...) is unknown. Known: {_CHANGEABLE}")
    return dict(changes)


class GatherStage(ProcessingStage[In, Out]):
    """A stage that needs all tasks of the pipeline at once, such as removing duplicates across a whole data set.

    One worker sees all of them. They are kept on disk in between, so neither it nor the driver holds them in memory.
    `batch_size`, `num_workers` and `max_retries` mean nothing here and are refused. What `process_all` raises ends the
    run, also with `on_failure="set_aside"`: no single task is to blame. If its worker dies it starts anew, once.
    """

    def process_all(self, tasks: Sequence[In]) -> Any:
        """Yield the tasks that go on.

        Args:
            tasks: in the order of the pipeline's input; each is read from disk when it is asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no process_all")


class CompositeStage(ProcessingStage[In, Out]):
    """Several stages under one name. Subclass it and write `decompose`."""

    def decompose(self) -> list[Any]:
        """The stages (also functions and composite stages) that it stands for."""
        raise NotImplementedError(f"{type(self).__name__} has no decompose")

    def with_(self, **changes: Any) -> Self:
        """A copy. Everything but a new name is for each of its stages for which it means something."""
        result = copy.copy(self)
        changes = checked_changes(self.name, changes)
        result.name = changes.pop("name", self.name)
        result._changes = {**getattr(self, "_changes", {}), **changes}
        return result

    _changes: Mapping[str, Any] = {}


class FunctionStage(ProcessingStage[Task[Any], Task[Any]]):
    """A plain function of one task as a stage. Unless `outputs` is given it may add anything."""

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
    """Decorator that makes a function a stage: `@processing_stage(name="lower", batch_size=8)`.

    Takes what `with_` takes, and `inputs=` and `outputs=`.
    """

    def decorate(function: Callable[[Any], Returned]) -> FunctionStage:
        return FunctionStage(function, **options)

    return decorate


def useless_attributes(stage: AnyStage) -> dict[str, tuple[Any, ...]]:
    """Attributes that mean nothing for a stage, each with the values that say so."""
    if stage.runs_in_driver:
        return {"runtime_env": (None, {}), "num_workers": (None, 1), "resources": (Resources(),)}
    if isinstance(stage, GatherStage):
        return {"batch_size": (1,), "num_workers": (None, 1), "max_retries": (None, 0)}
    return {}


def _changed(stage: AnyStage, changes: Mapping[str, Any]) -> AnyStage:
    """The part of a composite stage with those of its changes that mean something for the part."""
    useful = {name: value for name, value in changes.items() if name not in useless_attributes(stage)}
    return stage.with_(**useful) if useful else stage


def expanded(stages: Sequence[Any]) -> list[AnyStage]:
    """All stages as `ProcessingStage`s: functions wrapped, composite stages replaced by their parts.

    Raises:
        PipelineDefinitionError: something that is no stage.
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
            hint = " (the class itself: make an object of it)" if inspect.isclass(stage) else ""
            raise PipelineDefinitionError(
                f"{stage!r}{hint} is no stage: expected a ProcessingStage, a CompositeStage or a function of one task"
            )
    return result
