"""Readers and writers. Most tests call them directly; some run pipelines on a real Ray cluster."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_stages import full_disk

from nemo_rl.errors import DataError, PipelineDefinitionError, ResumeError, StageError
from nemo_rl.pipelines import DocumentBatch, EmptyTask, FileGroupTask, Pipeline, RayActorPoolExecutor
from nemo_rl.pipelines.io.files import list_files, parse_size, prepare_directory
from nemo_rl.pipelines.io.partition import FilePartitioningStage
from nemo_rl.pipelines.io.readers import JsonlReader, JsonlReadStage, ParquetReader
from nemo_rl.pipelines.io.writers import JsonlWriter, ParquetWriter, SingleParquetWriter, read_back
from nemo_rl.pipelines.stage import expanded


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read_all(reader: Any) -> list[dict[str, Any]]:
    """Return the records of a reader, without Ray."""
    listing, reading = expanded([reader])
    batches = [reading.process(task) for task in listing.process(EmptyTask())]
    return [record for batch in batches if batch is not None for record in batch.to_pyarrow().to_pylist()]


@pytest.mark.parametrize("task_size", [1, 7, 23, 64, 1000, "1MiB"])
def test_split_files_yield_every_line_once(tmp_path: Path, task_size: int | str) -> None:
    records = [{"n": n, "text": "ä" * (n % 9)} for n in range(50)]
    write_lines(tmp_path / "a.jsonl", records[:30])
    write_lines(tmp_path / "sub" / "b.jsonl.gz", records[30:45])
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(r) for r in records[45:]))  # no newline at the end
    (tmp_path / "_hidden.jsonl").write_text("not read")
    (tmp_path / "other.txt").write_text("not read")
    result = read_all(JsonlReader(tmp_path, task_size=task_size))
    assert sorted(record["n"] for record in result) == list(range(50))
    assert {record["n"]: record["text"] for record in result} == {r["n"]: r["text"] for r in records}


def test_tasks_have_similar_sizes(tmp_path: Path) -> None:
    for i in range(20):
        write_lines(tmp_path / f"{i:02}.jsonl", [{"text": "x" * 1000}])
    write_lines(tmp_path / "large.jsonl", [{"text": "x" * 1000}] * 20)
    stage = FilePartitioningStage(tmp_path, suffixes=(".jsonl",), split="lines", task_size=5000)
    tasks = stage.process(EmptyTask())
    assert 9 <= len(tasks) <= 12
    assert tasks[0].data == [str(tmp_path / f"{i:02}.jsonl") for i in range(4)]
    assert tasks[-1].parts[-1] is not None


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    writer = JsonlWriter(tmp_path, compression=suffix[1:])  # type: ignore[arg-type]
    table = pa.table({"text": ["eins", "zwei", "drü"]})
    (written,) = [writer.process(DocumentBatch("t", "d", table, _lineage="00007"))]
    assert written is not None
    assert written.data == [str(tmp_path / f"part-00007.jsonl{suffix}")]
    assert [record["text"] for record in read_all(JsonlReader(tmp_path))] == ["eins", "zwei", "drü"]


def test_parquet_splits_at_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(100), "m": [1.5] * 100}), tmp_path / "a.parquet", row_group_size=10)
    listing = expanded([ParquetReader(tmp_path, task_size=300)])[0]
    assert len(listing.process(EmptyTask())) > 3
    records = read_all(ParquetReader(tmp_path, task_size=300, columns=["n"]))
    assert [record["n"] for record in records] == list(range(100))
    assert set(records[0]) == {"n"}


def test_glob_skips_hidden_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "_SUCCESS", ".b.jsonl", "_tmp/c.jsonl", "d/_e.jsonl", "d/f.jsonl"):
        write_lines(tmp_path / name, [{"n": 1}])

    def listed(pattern: str) -> list[str]:
        return [Path(info.url).relative_to(tmp_path).as_posix() for info in list_files([f"{tmp_path}/{pattern}"], [])]

    assert listed("*") == ["a.jsonl"]
    assert listed("**/*.jsonl") == ["a.jsonl", "d/f.jsonl"]
    assert listed("_*") == ["_SUCCESS"]
    assert listed("_t*/*.jsonl") == ["_tmp/c.jsonl"]
    assert listed("d/_e.jsonl") == ["d/_e.jsonl"]


def test_fsspec_urls() -> None:
    writer = JsonlWriter("memory://out/folder")
    writer.prepare(resumes=False)
    for i in range(3):
        writer.process(DocumentBatch("t", "d", pa.table({"n": [i]}), _lineage=f"{i}"))
    assert [r["n"] for r in read_all(JsonlReader("memory://out/folder/part-[02]*"))] == [0, 2]
    assert [r["n"] for r in read_all(JsonlReader("memory://out/folder"))] == [0, 1, 2]
    with pytest.raises(DataError, match=r"nosuch://x"):
        list_files(["nosuch://x"], [".jsonl"])


def broken(tmp_path: Path, content: bytes, **options: Any) -> list[dict[str, Any]]:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    return read_all(JsonlReader(path, **options))


def test_broken_line_error_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bad\.jsonl:3: not a JSON object on one line"):
        broken(tmp_path, b'{"a": 1}\n\n{"a": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: expected a JSON object.*got a list"):
        broken(tmp_path, b'{"a": 1}\n[1]\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not UTF-8 text"):
        broken(tmp_path, b'{"a": "x"}\n{"a": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no key 'b'; the keys are: a"):
        broken(tmp_path, b'{"b": 1}\n{"a": 1}\n', columns=["b"])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: the values of 'a' have no common type"):
        broken(tmp_path, b'{"a": 1}\n{"a": "x"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:4: the values of 'a' have no common type .*too large"):
        broken(tmp_path, b'{"a": 1}\n{"a": null}\n\n{"a": 99999999999999999999}\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:3: the values of 'a' are not all of type int64"):
        broken(tmp_path, b'{"a": 1}\n{"a": null}\n{"a": "x"}\n', columns={"a": "int64"})
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not UTF-8 text: half of a surrogate pair"):
        broken(tmp_path, b'{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:41: not a JSON"):  # also in a file that is split
        broken(tmp_path, b'{"a": 1}\n' * 40 + b"nonsense\n", task_size=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"broken_lines": "skip"}, r"broken_lines='skip': expected one of \('error', 'set_aside'\)"),
        ({"fallback_encoding": "cp9999"}, "fallback_encoding='cp9999': unknown encoding: cp9999"),
        ({"fallback_encoding": "hex"}, "fallback_encoding='hex': 'hex' is not a text encoding"),
        ({"columns": {"a": "sting"}, "broken_lines": "set_aside"}, r"columns=\{'a': 'sting'\}"),
    ],
)
def test_invalid_reader_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineDefinitionError, match=message):
        JsonlReader("in", **options)


def test_invalid_compression() -> None:
    with pytest.raises(PipelineDefinitionError, match=r"compression='zip': expected one of \('gz', 'bz2'"):
        JsonlWriter("out", compression="zip")  # type: ignore[arg-type]


def test_broken_lines_can_be_converted_or_set_aside(tmp_path: Path) -> None:
    assert broken(tmp_path, b'{"a": "caf\xe9"}\n', fallback_encoding="cp1252") == [{"a": "café"}]
    mixed = b'{"a": 1}\n{"a": "x"}\n{"a": null}\n{"a": [2]}\n'
    assert [r["a"] for r in broken(tmp_path, mixed, columns={"a": "string"})] == ["1", "x", None, "[2]"]
    stage = JsonlReadStage(None, None, "set_aside")
    aside: list[Any] = []

    class Reporter:
        def dropped(self, reason: str, count: int, examples: Any) -> None:
            aside.append((reason, count))

        def set_aside(self, records: Any) -> None:
            aside.extend(record["where"].rpartition(":")[2] for record in records)

    stage._reporter = Reporter()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\nx\n{"a": 3}\n{"a"')
    batch = stage.process(FileGroupTask("t", "d", [str(path)]))
    assert batch is not None
    assert batch.to_pyarrow().to_pylist() == [{"a": 1}, {"a": 3}]
    assert aside == ["2", "4", ("broken line", 2)]
    aside.clear()
    typed = JsonlReadStage({"a": "int64"}, None, "set_aside")
    typed._reporter = Reporter()
    path.write_bytes(b'{"a": 1}\n{"a": "x"}\n{"a": "\\udc00"}\n{"a": 99999999999999999999}\n{"a": 5}\n')
    batch = typed.process(FileGroupTask("t", "d", [str(path)]))
    assert batch is not None
    assert batch.to_pyarrow().to_pylist() == [{"a": 1}, {"a": 5}]
    assert sorted(map(str, aside)) == ["('broken line', 3)", "2", "3", "4"]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_all(JsonlReader(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="there are no files"):
        read_all(JsonlReader(tmp_path))
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 9999)[:-20])
    with pytest.raises(DataError, match=r"half\.jsonl\.gz cannot be read"):
        read_all(JsonlReader(tmp_path))
    (tmp_path / "half.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(DataError, match=r"half\.parquet cannot be read as Parquet"):
        read_all(ParquetReader(tmp_path))
    pq.write_table(pa.table({"n": [1]}), tmp_path / "half.parquet")
    with pytest.raises(DataError, match=r"half\.parquet: no column 'm'; the columns are: n"):
        read_all(ParquetReader(tmp_path, columns=["m"]))


def test_empty_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_text("\n  \n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "d.parquet")
    assert read_all(JsonlReader(tmp_path, columns={"n": "int64"})) == []
    assert read_all(ParquetReader(tmp_path)) == []


def test_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    table = pa.table({"text": [os.urandom(5000).hex() for _ in range(100)]})
    task = DocumentBatch("t", "d", table, _lineage="0")
    for writer in (JsonlWriter(tmp_path), ParquetWriter(tmp_path)):
        with full_disk(100_000), pytest.raises(DataError, match=r"part-0\.(jsonl|parquet) cannot be written"):
            writer.process(task)
    single = SingleParquetWriter(tmp_path / "all.parquet")
    with full_disk(100_000), pytest.raises(DataError, match=r"all\.parquet cannot be written"):
        list(single.process_all([task]))
    assert not list(tmp_path.iterdir())


def test_unwritable_outputs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        JsonlWriter(tmp_path / "file" / "below").prepare(resumes=False)
    with pytest.raises(DataError, match="not empty; choose another one, or set overwrite=True"):
        JsonlWriter(tmp_path).prepare(resumes=False)
    JsonlWriter(tmp_path).prepare(resumes=True)
    JsonlWriter(tmp_path, overwrite=True).prepare(resumes=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="is a directory; name a file"):
        SingleParquetWriter(tmp_path).prepare(resumes=False)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        SingleParquetWriter(tmp_path / "file" / "all.parquet").prepare(resumes=False)
    with pytest.raises(ResumeError, match=r"the run directory .*file/run cannot be written"):
        Pipeline("p", stages=[JsonlReader(tmp_path / "in")]).run(run_dir=tmp_path / "file" / "run")


def test_prepare_file_removes_leftovers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/proc/all\.parquet cannot be written"):
        SingleParquetWriter("/proc/all.parquet").prepare(resumes=False)
    SingleParquetWriter("memory://single/all.parquet").prepare(resumes=False)
    others = tmp_path / "all.parquet", tmp_path / "_writing-all.parquet-2-5f"
    for path in (*others, tmp_path / "_writing-all.parquet-5f"):  # left by a writer that was killed
        path.touch()
    SingleParquetWriter(tmp_path / "all.parquet").prepare(resumes=False)
    assert sorted(tmp_path.iterdir()) == sorted(others)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written"):
        ParquetWriter(tmp_path / "out").prepare(resumes=False)


def test_sizes() -> None:
    assert [parse_size(size) for size in (7, "7B", "2 kib", "1.5MiB", "1GB")] == [7, 7, 2048, 1572864, 10**9]
    for wrong in (0, "", "MiB", "7 miles", -1, True):
        with pytest.raises(DataError, match="is not a size"):
            parse_size(wrong)


@pytest.mark.usefixtures("ray_local")
def test_shards_and_single_file(tmp_path: Path) -> None:
    for i in range(6):
        write_lines(tmp_path / "in" / f"{i}.jsonl", [{"n": 10 * i + j, "text": f"t{j}"} for j in range(10)])
    out = tmp_path / "out"
    stages = [JsonlReader(tmp_path / "in", task_size=300), ParquetWriter(out, columns=["n"])]
    tasks = Pipeline("p", stages=stages).run(RayActorPoolExecutor())
    assert sorted(path for task in tasks for path in task.data) == sorted(map(str, out.iterdir()))
    assert [n for task in tasks for n in read_back(task)["n"].to_pylist()] == list(range(60))

    single = tmp_path / "single" / "all.parquet"
    (task,) = Pipeline("p", stages=[ParquetReader(out, task_size=1), SingleParquetWriter(single)]).run()
    assert pq.read_table(single)["n"].to_pylist() == list(range(60))
    assert task._metadata == {"num_rows": 60}
    assert [path.name for path in single.parent.iterdir()] == ["all.parquet"]


def test_held_out_rows_are_stable(tmp_path: Path) -> None:
    def split(count: int) -> tuple[list[str], list[str]]:
        train, held_out = tmp_path / f"{count}.parquet", tmp_path / f"{count}-held-out.parquet"
        writer = SingleParquetWriter(train, held_out=held_out, held_out_share=0.25)
        writer.prepare(resumes=False)
        rows = pa.table({"text": [f"row {i}" for i in range(count)], "n": range(count)})
        outputs = list(
            writer.process_all([DocumentBatch("t", "d", part) for part in (rows[: count // 2], rows[count // 2 :])])
        )
        assert [(task.data, task._metadata["num_rows"]) for task in outputs] == [
            ([str(path)], pq.read_table(path).num_rows) for path in (train, held_out)
        ]
        return pq.read_table(train)["text"].to_pylist(), pq.read_table(held_out)["text"].to_pylist()

    train, held_out = split(400)
    assert sorted(train + held_out) == sorted(f"row {i}" for i in range(400))
    assert 60 < len(held_out) < 140
    more_train, more_held_out = split(800)
    assert set(train) < set(more_train)
    assert set(held_out) < set(more_held_out)
    with pytest.raises(PipelineDefinitionError, match="held_out_share=1 "):
        SingleParquetWriter(tmp_path / "x.parquet", held_out_share=1)


def test_failed_writer_leaves_no_file(tmp_path: Path) -> None:
    writer = SingleParquetWriter(tmp_path / "all.parquet", held_out=tmp_path / "missing" / "held_out.parquet")
    with pytest.raises(DataError, match=r"held_out\.parquet cannot be written"):
        list(writer.process_all([DocumentBatch("t", "d", pa.table({"text": ["one"]}))]))
    assert not list(tmp_path.iterdir())


def test_rewrite_removes_a_killed_writers_file(tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    code = (
        "import os, sys, pyarrow as pa\n"
        "from nemo_rl.pipelines.io.writers import _atomic_parquet_writer\n"
        "with _atomic_parquet_writer(sys.argv[1], pa.schema([('n', pa.int64())])):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
    assert killed.returncode == -9
    assert [file.name.rpartition("-")[0] for file in tmp_path.iterdir()] == ["_writing-all.parquet"]
    list(SingleParquetWriter(path).process_all([DocumentBatch("t", "d", pa.table({"n": [1]}))]))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("ray_local")
def test_run_error_names_stage_file_and_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"n": 1}])
    (tmp_path / "in" / "b.jsonl").write_text('{"n": 2}\nbroken\n')
    pipeline = Pipeline("p", stages=[JsonlReader(tmp_path / "in", task_size=1)])
    with pytest.raises(StageError, match=r"'JsonlReadStage'.*b\.jsonl:2: not a JSON object"):
        pipeline.run()
    lenient = Pipeline("p", stages=[JsonlReader(tmp_path / "in", task_size=1, broken_lines="set_aside")])
    tasks = lenient.run(run_dir=tmp_path / "run")
    assert [n for task in tasks for n in task.to_pandas()["n"]] == [1, 2]
    (records,) = (tmp_path / "run" / "failed").rglob("*.records.jsonl")
    assert json.loads(records.read_text())["line"] == "broken\n"
    assert f"1 records were set aside in {tmp_path}/run/failed: 1 of stage 'JsonlReadStage'" in caplog.text


def test_prepare_directory_during_late_writes(tmp_path: Path) -> None:
    """A worker of a killed run may rename a temporary file while the directory is cleaned."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for number in range(100):
                (tmp_path / f"_writing-{number}").touch()
            for number in reversed(range(100)):
                with contextlib.suppress(FileNotFoundError):  # it was removed
                    (tmp_path / f"_writing-{number}").replace(tmp_path / "part-00000.jsonl")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(100):
            prepare_directory(str(tmp_path), resumes=True, overwrite=False)
    finally:
        stop.set()
        thread.join()
