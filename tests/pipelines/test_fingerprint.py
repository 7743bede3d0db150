"""Fingerprints of stages, and digests of inputs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sample_stages import AddOne

from nemo_rl.errors import ResumeError
from nemo_rl.pipelines import DocumentBatch, Pipeline, ProcessingStage, Task
from nemo_rl.pipelines.fingerprint import run_fingerprint, task_digest
from nemo_rl.pipelines.io.readers import JsonlReadStage
from nemo_rl.pipelines.run_directory import RunDirectory


@dataclass
class Options:
    mode: str = "a"


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


class Configured(ProcessingStage[Any, Any]):
    def __init__(self, option: Any) -> None:
        self.option = option
        self._cache = object()


OPTIONS = [1, True, 1.5, "1", None, [1], {"a": 1}, {"a": 2}, {1: "x", "b": 2}, {1, 2}, b"a", Options(), Options("b")]


def test_fingerprint_differs_per_option() -> None:
    fingerprints = [run_fingerprint("p", [Configured(option)]) for option in OPTIONS]
    assert len(set(fingerprints)) == len(OPTIONS)
    assert fingerprints == [run_fingerprint("p", [Configured(option)]) for option in OPTIONS]
    assert run_fingerprint("p", [Configured({"b": 2, "a": 1})]) == run_fingerprint("p", [Configured({"a": 1, "b": 2})])
    read, other = (JsonlReadStage({"a": kind}, None, "error") for kind in ("string", "int64"))
    assert run_fingerprint("p", [read]) != run_fingerprint("p", [other])


def test_fingerprint_covers_packages(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    stage = AddOne().with_(runtime_env={"uv": str(file)})
    file.write_text("packaging==23.2\n")
    before = run_fingerprint("p", [stage])
    file.write_text("# a comment\npackaging==23.2\n")
    assert run_fingerprint("p", [stage]) == before
    file.write_text("packaging==24.0\n")
    assert run_fingerprint("p", [stage]) != before
    assert run_fingerprint("p", [AddOne()], [{"uv": ["a"]}]) != run_fingerprint("p", [AddOne()], [{"uv": ["b"]}])
    assert run_fingerprint("p", [AddOne()], [{"env_vars": {"A": "1"}}]) == run_fingerprint("p", [AddOne()])


class NotPrepared(Exception):
    pass


class NeverPrepared(Configured):
    def prepare(self, resumes: bool) -> None:
        raise NotPrepared

    def process(self, task: Any) -> Any:
        return task


def test_other_packages_are_not_resumed(tmp_path: Path) -> None:
    def start(*packages: str) -> None:
        pipeline = Pipeline("p", stages=[NeverPrepared(1)], runtime_env={"uv": list(packages)})
        pipeline.run(initial_tasks=[Task("t", "d", 1)], run_dir=tmp_path)

    fields = [{"uv": ["packaging==23.2"]}]
    with RunDirectory.opened(tmp_path, "p", [NeverPrepared(1)], "stage by stage", fields) as directory:
        directory.begin()
    with pytest.raises(NotPrepared):
        start("packaging==23.2")
    with pytest.raises(ResumeError, match="other stages or other stage options"):
        start("packaging==24.0")


DATA = [
    *[b"a", b"b", {1: "x", "b": 2}, {"x": 1}, {"x", "y", "zz"}, [b"a"], Options(), Options("b")],
    *[Holder(1), Holder({"a"}), np.arange(3), np.arange(4), pa.table({"n": [1]}), "a", None],
]


def test_task_digest_ignores_memory_layout() -> None:
    text = "".join(["a", "b"])
    equal: list[tuple[Any, Any]] = [
        (pa.array([1, 2]), pa.array([0, 1, 2])[1:]),
        (pa.table({"n": [1, 2]}), pa.table({"n": [1, 2, 3]}).slice(0, 2)),
        (pd.DataFrame({"t": [text, text]}), pd.DataFrame({"t": [text, "".join(["a", "b"])]})),
    ]
    for one, other in equal:
        assert task_digest(Task("t", "d", one)) == task_digest(Task("t", "d", other))
    assert task_digest(Task("t", "d", pa.array([1], pa.int32()))) != task_digest(
        Task("t", "d", pa.array([1], pa.int64()))
    )
    assert task_digest(Task("t", "d", pd.DataFrame({"t": [1]}))) != task_digest(
        Task("t", "d", pd.DataFrame({"t": [2]}))
    )


def test_task_digest_covers_any_data() -> None:
    digests = [task_digest(Task("t", "d", data)) for data in DATA]
    assert len(set(digests)) == len(DATA)
    code = "import test_fingerprint as t; print(*[t.task_digest(t.Task('t', 'd', data)) for data in t.DATA])"
    for seed in ("1", "2"):  # the hash seed determines the order of sets
        folder = Path(__file__).parent
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{folder}:{folder.parents[1]}"}
        command = [sys.executable, "-c", code]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert output.split() == digests
    batches = [
        DocumentBatch("t", "d", table, metadata)
        for table, metadata in (
            (pa.table({"n": [b"a"]}), {}),
            (pa.table({"n": [b"b"]}), {}),
            (pa.table({"n": [b"b"]}), {"x": 1}),
            (pa.table({"n": pa.array([1], pa.int32())}), {}),
            (pa.table({"n": pa.array([1], pa.int64())}), {}),
        )
    ]
    assert len({task_digest(batch) for batch in batches}) == len(batches)


def test_changed_bytes_input_is_not_resumed(tmp_path: Path) -> None:
    def start(data: Any) -> list[Task[Any]]:
        with RunDirectory.opened(tmp_path, "p", [AddOne()]) as directory:
            directory.begin()
            return directory.sources([Task("t", "d", data)])

    start({1: b"a", "b": np.arange(2)})
    (task,) = start({"b": np.arange(2), 1: b"a"})
    assert task.data[1] == b"a"
    with pytest.raises(ResumeError, match="inputs of the run .* have changed"):
        start({1: b"b", "b": np.arange(2)})
