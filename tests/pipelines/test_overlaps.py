"""Overlapping inputs, outputs and run directories are refused before anything is deleted or Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines import Pipeline
from nemo_rl.pipelines.io.overlaps import refuse_overlaps
from nemo_rl.pipelines.io.readers import JsonlReader, ParquetReader
from nemo_rl.pipelines.io.writers import JsonlWriter, ParquetWriter, SingleParquetWriter
from nemo_rl.pipelines.stage import expanded


def check(*stages: Any, run_dir: Path | None = None) -> None:
    refuse_overlaps(expanded(stages), run_dir)


@pytest.mark.parametrize("read", ["raw", "raw/sub", "raw/*.jsonl", "raw/sub/../sub/a.jsonl", "link"])
def test_writer_cannot_overwrite_input(tmp_path: Path, read: str) -> None:
    source = tmp_path / "raw" / "sub" / "a.jsonl"
    source.parent.mkdir(parents=True)
    source.write_text('{"n": 1}\n')
    (tmp_path / "link").symlink_to("raw")
    pipeline = Pipeline("p", stages=[JsonlReader(tmp_path / read), JsonlWriter(tmp_path / "raw", overwrite=True)])
    with pytest.raises(PipelineDefinitionError, match="'JsonlWriter' writes to .*raw, where stage 'JsonlFiles' reads"):
        pipeline.run()
    assert source.read_text() == '{"n": 1}\n'
    assert not ray.is_initialized()


def test_output_cannot_be_input(tmp_path: Path) -> None:
    with pytest.raises(PipelineDefinitionError, match="'JsonlFiles' would read"):
        check(JsonlReader(tmp_path), JsonlWriter(tmp_path / "out", compression="gz"))
    with pytest.raises(PipelineDefinitionError, match="'ParquetFiles' would read"):
        check(ParquetReader(f"{tmp_path}/*/*.parquet"), ParquetWriter(tmp_path / "out"))
    with pytest.raises(PipelineDefinitionError, match="'ParquetFiles' would read"):
        check(ParquetReader(tmp_path), SingleParquetWriter(tmp_path / "all.parquet"))
    with pytest.raises(PipelineDefinitionError, match="'ParquetFiles' would read"):
        check(ParquetReader("memory://d"), ParquetWriter("memory://d/out"))
    with pytest.raises(PipelineDefinitionError, match=r"all\.parquet, where stage 'ParquetFiles' reads"):
        check(ParquetReader(tmp_path / "all.parquet"), SingleParquetWriter(tmp_path / "all.parquet"))
    with pytest.raises(PipelineDefinitionError, match="'JsonlFiles' would read the files in run_dir="):
        check(JsonlReader(tmp_path), run_dir=tmp_path / "run")
    with pytest.raises(PipelineDefinitionError, match="and so does stage 'SingleParquetWriter'"):
        check(SingleParquetWriter(tmp_path / "x", held_out=tmp_path / "y" / ".." / "x"))


def test_writer_cannot_contain_run_dir(tmp_path: Path) -> None:
    for run_dir in (tmp_path / "out", tmp_path / "out" / "below" / "run"):
        with pytest.raises(PipelineDefinitionError, match="which contains run_dir="):
            check(JsonlReader(tmp_path / "raw"), JsonlWriter(tmp_path / "out", overwrite=True), run_dir=run_dir)


def test_set_aside_lines_need_a_run_dir(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("broken\n")
    pipeline = Pipeline("p", stages=[JsonlReader(source, broken_lines="set_aside")])
    with pytest.raises(PipelineDefinitionError, match="'JsonlReadStage' sets records aside and needs a run_dir"):
        pipeline.run()
    assert not ray.is_initialized()


def test_separate_paths_are_accepted(tmp_path: Path) -> None:
    check(JsonlReader(tmp_path / "raw"), JsonlWriter(tmp_path / "raw-clean"), run_dir=tmp_path / "raw-run")
    check(JsonlReader(tmp_path), SingleParquetWriter(tmp_path / "all.parquet"))  # the reader ignores Parquet files
    check(JsonlReader(f"{tmp_path}/*.jsonl"), JsonlWriter(tmp_path / "out"), run_dir=tmp_path / "run")
    check(JsonlReader(tmp_path / "sample.jsonl"), SingleParquetWriter(tmp_path / "all.parquet"), run_dir=tmp_path / "r")
    check(JsonlReader(tmp_path / "_x" / "raw"), JsonlWriter(tmp_path / "run" / "out"), run_dir=tmp_path / "run")


def test_process_memory_urls_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(PipelineDefinitionError, match=r"'JsonlFiles': memory://a/ is in the memory of one process"):
        Pipeline("p", stages=[JsonlReader("memory://a/*.jsonl")]).run()
    for writer in (JsonlWriter("memory://out"), SingleParquetWriter("memory://all.parquet")):
        with pytest.raises(
            PipelineDefinitionError, match=f"'{writer.name}': memory://.* is in the memory of one process"
        ):
            Pipeline("p", stages=[JsonlReader(tmp_path / "a.jsonl"), writer]).run()
    assert not ray.is_initialized()
