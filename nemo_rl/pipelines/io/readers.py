"""Reads JSONL and Parquet files."""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from nemo_rl.errors import DataError, PipelineDefinitionError
from nemo_rl.pipelines.io.files import opened
from nemo_rl.pipelines.io.partition import DEFAULT_TASK_SIZE, FilePartitioningStage, line_number
from nemo_rl.pipelines.stage import ANY_COLUMN, CompositeStage, ProcessingStage
from nemo_rl.pipelines.tasks import DocumentBatch, EmptyTask, FileGroupTask

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
# Column names, or names with Arrow types as text: {"answer": "string"}.
Columns = Sequence[str] | Mapping[str, str] | None
BrokenLines = Literal["error", "set_aside"]

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
_MAX_SHOWN = 160


class JsonlReader(CompositeStage[EmptyTask, DocumentBatch]):
    """Reads files with one JSON object per line, plain or compressed (.gz, .bz2, .xz, .zst).

    Example::

        JsonlReader("data/*.jsonl.gz", columns={"problem": "string", "answer": "string"}, broken_lines="set_aside")

    Args:
        paths: files, directories, glob patterns, or fsspec URLs.
        columns: names of the columns to read, or names with Arrow types. None reads all columns. With a type, values
            are converted: numbers in a "string" column become text.
        task_size: bytes of input per task. Larger files are split at line ends. A compressed file is one task.
        fallback_encoding: encoding of lines that are not UTF-8. With None, such a line is broken.
        broken_lines: "error", or "set_aside" to store broken lines in the run's `failed/` directory and continue, which
            needs a `run_dir`.
        dataset_name: defaults to the name of the first path.

    Raises:
        PipelineDefinitionError: a type, an encoding, or the value of `broken_lines` is unknown.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Columns = None,
        task_size: int | str = DEFAULT_TASK_SIZE,
        fallback_encoding: str | None = None,
        broken_lines: BrokenLines = "error",
        dataset_name: str = "",
    ) -> None:
        self._parts = [
            FilePartitioningStage(
                paths, suffixes=JSONL_SUFFIXES, split="lines", task_size=task_size, dataset_name=dataset_name
            ).with_(name="JsonlFiles"),
            JsonlReadStage(columns, fallback_encoding, broken_lines),
        ]

    def decompose(self) -> list[Any]:
        return list(self._parts)


class ParquetReader(CompositeStage[EmptyTask, DocumentBatch]):
    """Reads Parquet files. Large files are split at row groups. See `JsonlReader` for the arguments."""

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Sequence[str] | None = None,
        task_size: int | str = DEFAULT_TASK_SIZE,
        dataset_name: str = "",
    ) -> None:
        self._parts = [
            FilePartitioningStage(
                paths, suffixes=(".parquet",), split="row_groups", task_size=task_size, dataset_name=dataset_name
            ).with_(name="ParquetFiles"),
            ParquetReadStage(columns),
        ]

    def decompose(self) -> list[Any]:
        return list(self._parts)


class _ReadStage(ProcessingStage[FileGroupTask, DocumentBatch]):
    def __init__(self, columns: Columns) -> None:
        self.columns = None if columns is None else list(columns)

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [ANY_COLUMN] if self.columns is None else self.columns

    def _batch(self, task: FileGroupTask, table: Any) -> DocumentBatch:
        return DocumentBatch(task.task_id, task.dataset_name, table, _metadata={"source_files": list(task.data)})


class JsonlReadStage(_ReadStage):
    """Reads the lines of a group of files into one batch. See `JsonlReader`."""

    def __init__(self, columns: Columns, fallback_encoding: str | None, broken_lines: BrokenLines) -> None:
        super().__init__(columns)
        self.types = dict(columns) if isinstance(columns, Mapping) else {}
        if broken_lines not in get_args(BrokenLines):
            raise PipelineDefinitionError(f"broken_lines={broken_lines!r}: expected one of {get_args(BrokenLines)}")
        _check_encoding(fallback_encoding)
        _check_types(self.types)
        self.fallback_encoding = fallback_encoding
        self.broken_lines = broken_lines

    def needs_run_dir(self) -> bool:
        return self.broken_lines == "set_aside"

    def process(self, task: FileGroupTask) -> DocumentBatch | None:
        records: list[_Record] = []
        broken: list[dict[str, Any]] = []
        for url, part in zip(task.data, task.parts or [None] * len(task.data)):
            for offset, number, line in _lines(url, part):
                record = _Record(url, part, offset, number, line)
                try:
                    record.values = self._parsed(line)
                    records.append(record)
                except DataError as error:
                    if self.broken_lines == "error":
                        raise DataError(f"{record.where}: {error}") from None
                    broken.append(record.broken(str(error)))
        if self.broken_lines == "set_aside":
            records, misfits = self._fitting(records)
            broken += misfits
        self.set_aside(broken)
        self.dropped("broken line", len(broken), broken)
        if not records:
            return None
        return self._batch(task, self._table(records))

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.fallback_encoding is None:
                raise DataError(f"not UTF-8 text: {error}") from None
            text = line.decode(self.fallback_encoding, errors="replace")
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a JSON object on one line: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"expected a JSON object such as {{...}}, got a {type(record).__name__}")
        if "\\u" in text:
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise DataError(f"not UTF-8 text: half of a surrogate pair: {error}") from None
        for name in self.columns or ():
            if name not in record:
                raise DataError(f"no key {name!r}; the keys are: {', '.join(record)}")
        return record

    def _fitting(self, records: list[_Record]) -> tuple[list[_Record], list[dict[str, Any]]]:
        """Split records into those whose values have the given types, and those that are broken."""
        reasons: dict[int, str] = {}
        for name, kind in self.types.items():
            values = [record.values.get(name) for record in records]
            if _conversion_error(values, kind) is not None:
                for index, value in enumerate(values):
                    error = _conversion_error([value], kind)
                    if error is not None:
                        reasons.setdefault(index, f"the value of {name!r} is not of type {kind}: {error}")
        fitting = [record for index, record in enumerate(records) if index not in reasons]
        return fitting, [records[index].broken(reason) for index, reason in sorted(reasons.items())]

    def _table(self, records: list[_Record]) -> Any:
        import pyarrow

        names = self.columns or list(dict.fromkeys(name for record in records for name in record.values))
        columns = {}
        for name in names:
            values = [record.values.get(name) for record in records]
            kind = self.types.get(name)
            error = _conversion_error(values, kind)
            if error is not None:
                where = records[_first_misfit(values, kind)].where
                what = "have no common type" if kind is None else f"are not all of type {kind}"
                raise DataError(
                    f"{where}: the values of {name!r} {what} ({error}). Set one: columns={{{name!r}: 'string', ...}}"
                )
            columns[name] = _array(values, kind)
        return pyarrow.table(columns)


@dataclass
class _Record:
    """Holds a line of a file with its position, and its values once they have been parsed."""

    url: str
    part: tuple[int, int] | None
    offset: int
    number: int
    line: bytes
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.url}:{self.number if self.part is None else line_number(self.url, self.offset)}"

    def broken(self, error: str) -> dict[str, Any]:
        """Return the record to store for a broken line."""
        return {"where": self.where, "error": error, "line": self.line.decode("utf-8", "replace")}


class ParquetReadStage(_ReadStage):
    """Reads a group of files, or row groups of a file, into one batch. See `ParquetReader`."""

    def process(self, task: FileGroupTask) -> DocumentBatch:
        import pyarrow

        tables = [self._read(url, part) for url, part in zip(task.data, task.parts or [None] * len(task.data))]
        try:
            return self._batch(task, pyarrow.concat_tables(tables, promote_options="permissive"))
        except pyarrow.ArrowException as error:
            raise DataError(f"the columns of {', '.join(task.data)} are incompatible: {error}") from error

    def _read(self, url: str, part: tuple[int, int] | None) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            with opened(url) as stream:
                file = pyarrow.parquet.ParquetFile(stream)
                names = file.schema_arrow.names
                missing = [name for name in self.columns or () if name not in names]
                if missing:
                    raise DataError(f"{url}: no column {missing[0]!r}; the columns are: {', '.join(names)}")
                groups = range(file.num_row_groups) if part is None else range(*part)
                return file.read_row_groups(list(groups), columns=self.columns)
        except pyarrow.ArrowException as error:
            raise DataError(f"{url} cannot be read as Parquet: {error}") from error


def _lines(url: str, part: tuple[int, int] | None) -> Iterator[tuple[int, int, bytes]]:
    """Yield (byte offset, number within the part, line) for every line that is not empty and starts in `part`."""
    with opened(url) as stream:
        start, stop = part or (0, None)
        offset = start
        if start:
            stream.seek(start - 1)
            offset += len(stream.readline()) - 1  # a line that starts before `start` belongs to the previous part
        for number, line in enumerate(iter(stream.readline, b""), start=1):
            if stop is not None and offset >= stop:
                return
            content = line[3:] if offset == 0 and line.startswith(b"\xef\xbb\xbf") else line
            if content.strip():
                yield offset, number, content
            offset += len(line)


def _check_encoding(name: str | None) -> None:
    """Raise `PipelineDefinitionError` if `name` is not a text encoding."""
    try:
        b"a".decode("utf-8" if name is None else name)
    except (LookupError, UnicodeError, TypeError) as error:
        raise PipelineDefinitionError(f"fallback_encoding={name!r}: {error}") from None


def _check_types(types: Mapping[str, str]) -> None:
    """Raise `PipelineDefinitionError` if Arrow does not know a type."""
    import pyarrow

    for column, kind in types.items():
        try:
            pyarrow.type_for_alias(kind)
        except (ValueError, TypeError) as error:
            raise PipelineDefinitionError(f"columns={{{column!r}: {kind!r}}}: {error}") from None


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _array(values: list[Any], kind: str | None) -> Any:
    """Convert values to an Arrow array. Raises the errors that `_conversion_error` catches."""
    import pyarrow

    if kind == "string":
        values = [_as_text(value) for value in values]
    return pyarrow.array(values, None if kind is None else pyarrow.type_for_alias(kind))


def _conversion_error(values: list[Any], kind: str | None) -> Exception | None:
    """Return the error of converting values to an Arrow array of type `kind` (None: inferred), or None."""
    import pyarrow

    try:
        _array(values, kind)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        return error
    return None


def _first_misfit(values: list[Any], kind: str | None) -> int:
    """Return the position of the first value that cannot be converted together with the previous values."""
    lengths = range(1, len(values) + 1)
    return bisect.bisect_left(lengths, True, key=lambda length: _conversion_error(values[:length], kind) is not None)
