"""Checks before a run starts, and `describe`. No test starts Ray."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import ray
from sample_stages import AddOne, Failing, batches

import nemo_rl.pipelines
from nemo_rl.errors import DataError, PipelineDefinitionError
from nemo_rl.pipelines import (
    ANY_COLUMN,
    CompositeStage,
    DocumentBatch,
    FunctionStage,
    GatherStage,
    Pipeline,
    ProcessingStage,
    Resources,
    processing_stage,
)
from nemo_rl.pipelines.io.readers import JsonlReader
from nemo_rl.pipelines.stage import expanded


@pytest.fixture(autouse=True)
def _nothing_starts() -> Any:
    yield
    assert not ray.is_initialized()


def test_exported_names_resolve() -> None:
    for name in nemo_rl.pipelines.__all__:
        assert getattr(getattr(nemo_rl.pipelines, name), "__name__", name) == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = nemo_rl.pipelines.Nothing


class Reads(ProcessingStage[Any, DocumentBatch]):
    def __init__(self, *columns: str) -> None:
        self._columns = list(columns)

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], self._columns

    def process(self, task: Any) -> DocumentBatch:
        return batches(1)[0]


class NeedsText(ProcessingStage[DocumentBatch, DocumentBatch]):
    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], ["text"]

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], ["clean"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        return task


def run(*stages: Any, tasks: Any = None) -> None:
    Pipeline("p", stages=stages).run(initial_tasks=tasks)


def test_incompatible_stages() -> None:
    with pytest.raises(PipelineDefinitionError, match="has no stages"):
        run()
    with pytest.raises(PipelineDefinitionError, match="2 stages are named 'AddOne'; give them names"):
        run(AddOne(), AddOne(), tasks=batches(1))
    with pytest.raises(PipelineDefinitionError, match=r"'NeedsText' needs the column 'text'.*available: number"):
        run(NeedsText(), tasks=batches(1))
    with pytest.raises(PipelineDefinitionError, match=r"'NeedsText' needs the attribute 'data', which no earlier"):
        run(NeedsText())
    with pytest.raises(PipelineDefinitionError, match=r"'NeedsText' needs the column 'text'"):
        run(Reads("a", "b"), NeedsText())
    with pytest.raises(PipelineDefinitionError, match=r"'after' needs the column 'text'"):
        run(Reads("number"), NeedsText().with_(name="after"), tasks=batches(1))
    with pytest.raises(PipelineDefinitionError, match=r"must define process or process_batch"):
        run(type("Empty", (ProcessingStage,), {})())
    with pytest.raises(PipelineDefinitionError, match=r"must define process_all"):
        run(type("Empty", (GatherStage,), {})())
    with pytest.raises(PipelineDefinitionError, match=r"a class: pass an instance"):
        run(AddOne)
    with pytest.raises(PipelineDefinitionError, match=r"3 is not a stage"):
        run(3)


def test_outputs_satisfy_later_inputs() -> None:
    from nemo_rl.pipelines.planning import checked_stages

    stages = expanded([Reads("text"), NeedsText(), NeedsText().with_(name="two")])
    tasks = [nemo_rl.pipelines.EmptyTask()]
    assert checked_stages(stages, tasks, {"env_vars": {"A": "1"}}) == [{"env_vars": {"A": "1"}}] * 3
    checked_stages(expanded([Reads(ANY_COLUMN), NeedsText()]), tasks, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"batch_size": None}, "batch_size must be"),
        ({"num_workers": 0}, "num_workers must be"),
        ({"max_retries": -1}, "max_retries must be"),
        ({"max_retries": True}, "max_retries must be"),
        ({"resources": 2}, r"resources must be Resources\(...\), not 2"),
        ({"name": " "}, "has the name ' '"),
    ],
)
def test_invalid_attributes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineDefinitionError, match=message):
        run(AddOne().with_(**changes), tasks=batches(1))


class First(GatherStage[Any, Any]):
    def process_all(self, tasks: Any) -> Any:
        yield tasks[0]


class Lists(Reads):
    runs_in_driver = True


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (First(), {"batch_size": 2}),
        (First(), {"num_workers": 2}),
        (First(), {"max_retries": 1}),
        (Lists("number"), {"runtime_env": {"uv": ["packaging==23.2"]}}),
        (Lists("number"), {"num_workers": 2}),
        (Lists("number"), {"resources": Resources(cpus=2)}),
    ],
)
def test_unsupported_attributes(stage: Any, changes: dict[str, Any]) -> None:
    kind = "a stage that runs in the driver" if stage.runs_in_driver else "a GatherStage"
    with pytest.raises(PipelineDefinitionError, match=f"{next(iter(changes))}=.* is not supported by {kind}"):
        run(stage.with_(**changes), tasks=batches(1))

    class Both(CompositeStage[Any, Any]):
        def decompose(self) -> list[Any]:
            return [stage, AddOne()]

    # In a composite stage, the change applies to the other stage only.
    unchanged, other = expanded([Both().with_(**changes)])
    assert unchanged is stage
    assert {name: getattr(other, name) for name in changes} == changes


def test_invalid_run_options() -> None:
    pipeline = Pipeline("p", stages=[AddOne()])
    with pytest.raises(PipelineDefinitionError, match="needs a run_dir"):
        pipeline.run(initial_tasks=batches(1), on_failure="set_aside")
    with pytest.raises(PipelineDefinitionError, match="'stop' or 'set_aside', not 'ignore'"):
        pipeline.run(initial_tasks=batches(1), on_failure="ignore")  # type: ignore[arg-type]
    with pytest.raises(PipelineDefinitionError, match="max_retries"):
        pipeline.run(initial_tasks=batches(1), max_retries=-1)
    with pytest.raises(PipelineDefinitionError, match="holds 7, which is not a Task"):
        pipeline.run(initial_tasks=[7])  # type: ignore[list-item]
    assert pipeline.run(initial_tasks=[]) == []


def test_resources() -> None:
    assert Resources() == Resources(cpus=1, gpus=0, gpu_memory_gb=0)
    with pytest.raises(PipelineDefinitionError, match=r"cpus=-1"):
        Resources(cpus=-1)
    with pytest.raises(PipelineDefinitionError, match="either gpus or gpu_memory_gb"):
        Resources(gpus=1, gpu_memory_gb=10)


def test_with_returns_a_changed_copy() -> None:
    stage = AddOne()
    changed = stage.with_(name="other", batch_size=4, runtime_env={"uv": ["a"]}, num_workers=2, max_retries=3)
    assert (stage.name, stage.batch_size, stage.runtime_env) == ("AddOne", 1, None)
    assert (changed.name, changed.batch_size, changed.runtime_env) == ("other", 4, {"uv": ["a"]})
    assert (changed.num_workers, changed.max_retries) == (2, 3)
    assert AddOne.name == "AddOne"
    with pytest.raises(PipelineDefinitionError, match=r"with_\(cpus=...\) is unknown"):
        stage.with_(cpus=3)


class Two(CompositeStage[DocumentBatch, DocumentBatch]):
    def decompose(self) -> list[Any]:
        return [AddOne(), Inner()]


class Inner(CompositeStage[DocumentBatch, DocumentBatch]):
    def decompose(self) -> list[Any]:
        return [len, Failing([1]).with_(num_workers=1)]


def test_composite_stages_apply_changes() -> None:
    stages = expanded([Two().with_(runtime_env={"uv": ["a"]}).with_(batch_size=3, name="mine")])
    assert [stage.name for stage in stages] == ["AddOne", "len", "Failing"]
    assert all(stage.runtime_env == {"uv": ["a"]} and stage.batch_size == 3 for stage in stages)
    assert stages[2].num_workers == 1


def test_function_stages() -> None:
    @processing_stage(name="lower", batch_size=8, inputs=([], ["text"]), outputs=([], ["low"]))
    def to_lower(task: DocumentBatch) -> DocumentBatch:
        return task

    assert isinstance(to_lower, FunctionStage)
    assert (to_lower.name, to_lower.batch_size) == ("lower", 8)
    assert (to_lower.inputs(), to_lower.outputs()) == (([], ["text"]), ([], ["low"]))
    assert expanded([lambda task: task])[0].name == "<lambda>"


def test_describe_hides_secrets() -> None:
    stage = NeedsText().with_(
        resources=Resources(cpus=2, gpus=0.5), runtime_env={"uv": ["a==1"], "env_vars": {"KEY": "hidden"}}
    )
    text = Pipeline("name", "what it is for", [Two(), stage]).describe()
    assert text.splitlines()[0] == "Pipeline 'name': what it is for"
    assert "4. NeedsText (NeedsText): 2 CPUs, 0.5 GPUs, batches of up to 1" in text
    assert "needs data, column text" in text
    assert "adds data, column clean" in text
    assert "a==1" in text
    assert "expanded from Two" in text
    assert "hidden" not in text
    reader = Pipeline("p", stages=[JsonlReader("in")], runtime_env={"env_vars": {"A": "b"}}).describe().splitlines()
    assert [line.strip() for line in reader if "Python" in line] == [
        "Python: the driver’s; runs in the driver",
        "Python: {'env_vars': ['A']}",
    ]


def test_document_batch_rejects_other_data() -> None:
    with pytest.raises(DataError, match=r"not builtins\.list"):
        DocumentBatch("a", "b", [1])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="cannot be turned into an Arrow table"):
        Pipeline("p", stages=[AddOne()]).run(
            initial_tasks=[DocumentBatch("a", "b", pd.DataFrame({"number": [1], "x": [object()]}))]
        )
