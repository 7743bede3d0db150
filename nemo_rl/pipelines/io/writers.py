"""Writes JSONL and Parquet files. Shards are written atomically, and their names derive from the input's position."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from nemo_rl.errors import DataError, PipelineDefinitionError
from nemo_rl.pipelines.io.files import (
    file_system,
    opened,
    prepare_directory,
    prepare_file,
    remove_temporaries,
    temporary_name,
    write_file,
)
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

    def writes_to(self) -> list[str]:
        return [f"{self.path}/", f"{self.path}/part-00000{self.suffix}"]

    def process(self, task: DocumentBatch) -> FileGroupTask | None:
        table = task.to_pyarrow()
        if not table.num_rows:
            return None
        # A task has the same shard name in every attempt, so work that is repeated replaces its earlier output.
        url = f"{self.path}/part-{task._lineage}{self.suffix}"
        write_file(url, self._encoded(table if self.columns is None else table.select(self.columns)))
        metadata = {**task._metadata, "num_rows": table.num_rows}
        return FileGroupTask(task.task_id, task.dataset_name, [url], _metadata=metadata)

    def _encoded(self, table: Any) -> Any:
        raise NotImplementedError


class JsonlWriter(_ShardWriter):
    """Writes each batch as a file of JSON lines in a directory. The result holds the path of the file.

    Args:
        path: directory or fsspec URL. It must be empty, unless the run is resumed or `overwrite` is set.
        columns: columns to write; None writes all.
        compression: "gz", "bz2", "xz" or "zst"; None writes plain text.
        overwrite: delete the files in the directory when a new run starts.
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
        if compression is not None and compression not in get_args(Compression):
            raise PipelineDefinitionError(
                f"JsonlWriter: compression={compression!r}: expected one of {get_args(Compression)}, or None"
            )
        self.compression = compression
        self.suffix = ".jsonl" + (f".{compression}" if compression else "")

    def _encoded(self, table: Any) -> bytes:
        return _compressed(b"".join(_json_lines(table)), self.compression)


class ParquetWriter(_ShardWriter):
    """Writes each batch as a Parquet file in a directory. The result holds the path of the file. See `JsonlWriter`."""

    suffix = ".parquet"

    def _encoded(self, table: Any) -> Any:
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        return sink.getvalue()


class SingleParquetWriter(GatherStage[DocumentBatch, FileGroupTask]):
    """Writes the entire data set to one Parquet file, in the order of the input.

    Batches are read from disk one after another, so memory holds one batch at a time.

    Args:
        path: path of the file.
        columns: columns to write; None writes all.
        held_out: path of a second file, for a share of the rows that the first file does not get, such as validation
            data.
        held_out_share: share of the rows in the second file.
        key: column whose text selects the file of a row. The choice does not depend on other rows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        columns: Sequence[str] | None = None,
        held_out: str | os.PathLike[str] | None = None,
        held_out_share: float = 0.1,
        key: str = "text",
    ) -> None:
        if not 0 < held_out_share < 1:
            raise PipelineDefinitionError(f"SingleParquetWriter: held_out_share={held_out_share!r} is not in (0, 1)")
        self.path = os.fspath(path)
        self.columns = None if columns is None else list(columns)
        self.held_out = None if held_out is None else os.fspath(held_out)
        self.held_out_share = held_out_share
        self.key = key

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [*(self.columns or []), *([self.key] if self.held_out else [])]

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], []

    def prepare(self, resumes: bool) -> None:
        for url in self._paths():
            prepare_file(url)

    def writes_to(self) -> list[str]:
        return self._paths()

    def _paths(self) -> list[str]:
        return [self.path, *([self.held_out] if self.held_out else [])]

    def process_all(self, tasks: Sequence[DocumentBatch]) -> Iterator[FileGroupTask]:
        import pyarrow

        tables = (task.to_pyarrow() for task in tasks)
        selected = (table if self.columns is None else table.select(self.columns) for table in tables)
        schema = pyarrow.unify_schemas([table.schema for table in selected], promote_options="permissive")
        counts = [0] * len(self._paths())
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(_atomic_parquet_writer(url, schema)) for url in self._paths()]
            for task in tasks:
                for index, part in enumerate(self._parts(task.to_pyarrow())):
                    writers[index].write_table(_with_schema(part, schema))
                    counts[index] += part.num_rows
        for url, num_rows in zip(self._paths(), counts):
            yield FileGroupTask(url, tasks[0].dataset_name, [url], _metadata={"num_rows": num_rows})

    def _parts(self, table: Any) -> list[Any]:
        """Split a table into the rows for each file."""
        if self.held_out is None:
            return [table]
        is_held_out = [self._is_held_out(value) for value in table.column(self.key).to_pylist()]
        return [table.filter([not held for held in is_held_out]), table.filter(is_held_out)]

    def _is_held_out(self, value: Any) -> bool:
        text = value if isinstance(value, str) else repr(value)
        digest = hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.held_out_share * 2**64


@contextlib.contextmanager
def _atomic_parquet_writer(url: str, schema: Any) -> Iterator[Any]:
    """Open a writer for a Parquet file that appears only if the block ends without an error."""
    import pyarrow.parquet

    files, path = file_system(url)
    temporary = temporary_name(path)
    try:
        remove_temporaries(url)  # left by a worker of this stage that died
        with files.open(temporary, "wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
            yield writer
        files.mv(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            files.rm(temporary)
        if isinstance(error, OSError):
            raise DataError(f"{url} cannot be written: {error}") from error
        raise


def _with_schema(table: Any, schema: Any) -> Any:
    """Convert a table to the schema. Missing columns are filled with nulls."""
    import pyarrow

    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pyarrow.nulls(table.num_rows, field.type))
    return table.select(schema.names).cast(schema)


def read_back(task: FileGroupTask) -> Any:
    """Read the rows that a writer wrote as an Arrow table, to inspect results."""
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
