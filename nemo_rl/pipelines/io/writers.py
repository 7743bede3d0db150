"""Writing JSONL and Parquet: shards that are whole or not there, named by where their content came from."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from nemo_rl.errors import DataError
from nemo_rl.pipelines.io.files import file_system, opened, prepare_directory, write_whole
from nemo_rl.pipelines.stage import GatherStage, ProcessingStage
from nemo_rl.pipelines.tasks import DocumentBatch, FileGroupTask

Compression = Literal["gz", "bz2", "xz", "zst"]


class _ShardWriter(ProcessingStage[DocumentBatch, FileGroupTask]):
    suffix = ""

    def __init__(self, path: str | os.PathLike[str], *, columns: Sequence[str] | None = None, overwrite: bool = False):
        self.path = os.fspath(path).rstrip("/")
        self.columns = None if columns is None else list(columns)
        self.overwrite = overwrite

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], self.columns or []

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], []

    def prepare(self, resumes: bool) -> None:
        prepare_directory(self.path, resumes, self.overwrite)

    def process(self, task: DocumentBatch) -> FileGroupTask | None:
        table = task.to_pyarrow()
        if not table.num_rows:
            return None
        # A shard that is written again, by a resumed run or for a worker that died, replaces itself.
        url = f"{self.path}/part-{task._lineage}{self.suffix}"
        write_whole(url, self._encoded(table if self.columns is None else table.select(self.columns)))
        metadata = {**task._metadata, "num_rows": table.num_rows}
        return FileGroupTask(task.task_id, task.dataset_name, [url], _metadata=metadata)

    def _encoded(self, table: Any) -> Any:
        raise NotImplementedError


class JsonlWriter(_ShardWriter):
    """Writes each batch as a file of JSON lines in a directory; the result holds the file's path.

    Args:
        path: directory or fsspec URL. It must be empty, unless a run is resumed or `overwrite` is given.
        columns: that are written; None: all.
        compression: "gz", "bz2", "xz", "zst"; None: plain.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        columns: Sequence[str] | None = None,
        compression: Compression | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(path, columns=columns, overwrite=overwrite)
        self.compression = compression
        self.suffix = ".jsonl" + (f".{compression}" if compression else "")

    def _encoded(self, table: Any) -> bytes:
        return _compressed(b"".join(_json_lines(table)), self.compression)


class ParquetWriter(_ShardWriter):
    """Writes each batch as a Parquet file in a directory; the result holds the file's path. See `JsonlWriter`."""

    suffix = ".parquet"

    def _encoded(self, table: Any) -> Any:
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        return sink.getvalue()


class SingleParquetWriter(GatherStage[DocumentBatch, FileGroupTask]):
    """Writes the whole data set into one Parquet file, in the order of the input; for what fits on one disk.

    Batches are read from disk one after another, so memory holds one at a time.
    """

    def __init__(self, path: str | os.PathLike[str], *, columns: Sequence[str] | None = None) -> None:
        self.path = os.fspath(path)
        self.columns = None if columns is None else list(columns)

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], self.columns or []

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], []

    def prepare(self, resumes: bool) -> None:
        files, path = file_system(self.path)
        try:
            files.makedirs(os.path.dirname(path), exist_ok=True)
            if files.isdir(path):
                raise DataError(f"{self.path} is a directory; name a file")
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error}") from error

    def process_all(self, tasks: Sequence[DocumentBatch]) -> Iterator[FileGroupTask]:
        import pyarrow
        import pyarrow.parquet

        tables = (task.to_pyarrow() for task in tasks)
        selected = (table if self.columns is None else table.select(self.columns) for table in tables)
        schema = pyarrow.unify_schemas([table.schema for table in selected], promote_options="permissive")
        files, path = file_system(self.path)
        temporary = f"{path}.writing-{os.getpid()}"
        num_rows = 0
        with files.open(temporary, "wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for task in tasks:
                table = task.to_pyarrow()
                missing = [field for field in schema if field.name not in table.column_names]
                for field in missing:
                    table = table.append_column(field, pyarrow.nulls(table.num_rows, field.type))
                writer.write_table(table.select(schema.names).cast(schema))
                num_rows += table.num_rows
        files.mv(temporary, path)
        yield FileGroupTask("all", tasks[0].dataset_name, [self.path], _metadata={"num_rows": num_rows})


def read_back(task: FileGroupTask) -> Any:
    """The rows that a writer wrote, as an Arrow table; for looking at results."""
    import pyarrow
    import pyarrow.parquet

    tables = []
    for url in task.data:
        with opened(url) as stream:
            if url.endswith(".parquet"):
                tables.append(pyarrow.parquet.read_table(stream))
            else:
                tables.append(pyarrow.Table.from_pylist([json.loads(line) for line in stream]))
    return pyarrow.concat_tables(tables, promote_options="permissive")


def _json_lines(table: Any) -> Iterator[bytes]:
    for batch in table.to_batches(max_chunksize=1024):
        for record in batch.to_pylist():
            yield json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", errors="replace") + b"\n"


def _compressed(content: bytes, compression: Compression | None) -> bytes:
    if compression == "gz":
        return gzip.compress(content, mtime=0)
    if compression == "bz2":
        return bz2.compress(content)
    if compression == "xz":
        return lzma.compress(content)
    if compression == "zst":
        import pyarrow

        return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return content
