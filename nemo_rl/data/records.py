"""Reads records, which are dicts, from JSONL and Parquet files and from Hugging Face data sets."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from nemo_rl.data.config import RecordsConfig
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.utils.names import nearest_names

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = (".gz", ".zst")


class Records(ABC):
    """Gives access to the records of a file or data set by position.

    Attributes:
        name: Name of the file or data set.
        columns: Names of the columns if all records have the same, else None.
    """

    name: str
    columns: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, index: int) -> dict[str, Any]:
        """Return the record at `0 <= index < len(self)`. Raises `DataError` if it is no JSON object."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the place of a record for messages: file and line, or data set and row."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.record(index) for index in range(len(self)))


class JsonlRecords(Records):
    """Reads one JSON object per line, plain or compressed (.gz, .zst). Empty lines are skipped.

    Memory holds the offset of each line, and for a compressed file the decompressed bytes.

    Args:
        path: The file.
        limit: Use only the first records.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.name = str(path)
        self._offsets, self._line_numbers = array("q"), array("q")
        self._file = _open_lines(path)
        offset = 0
        for line_number, line in enumerate(self._file, start=1):
            if line_number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]  # a byte order mark that some editors write
                offset = 3
            if line.strip():
                self._offsets.append(offset)
                self._line_numbers.append(line_number)
                if len(self._offsets) == limit:
                    break
            offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def record(self, index: int) -> dict[str, Any]:
        self._file.seek(self._offsets[index])
        return self._parsed(self._file.readline(), self.where(index))

    def where(self, index: int) -> str:
        return f"{self.name}:{self._line_numbers[index]}"

    @staticmethod
    def _parsed(line: bytes, where: str) -> dict[str, Any]:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 text: {error}") from None
        except ValueError as error:  # JSONDecodeError, and numbers with more digits than Python reads
            raise DataError(f"{where}: not a JSON object on one line: {error}") from None
        except RecursionError:
            raise DataError(f"{where}: the JSON is nested too deeply") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object such as {{...}}, got a {type(record).__name__}")
        return record


class TableRecords(Records):
    """Reads one record per row of an Arrow table; a row is converted to Python objects when it is read.

    Args:
        rows: `rows(start, stop)` returns a list of records. A null in a record means that it lacks the key.
        columns: Names of the columns.
        num_rows: Number of rows of the table.
        name: Name of the table in messages.
        keep_nulls: Columns whose nulls stay in the records.
    """

    def __init__(
        self, rows: Any, columns: list[str], num_rows: int, name: str, keep_nulls: Collection[str] = ()
    ) -> None:
        self._rows: Callable[[int, int], list[dict[str, Any]]] = rows
        self._num_rows, self._keep_nulls = num_rows, keep_nulls
        self.name, self.columns = name, columns

    def __len__(self) -> int:
        return self._num_rows

    def record(self, index: int) -> dict[str, Any]:
        (row,) = self._rows(index, index + 1)
        return self._record(row)

    def where(self, index: int) -> str:
        return f"{self.name} row {index}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self._num_rows, 1024):
            yield from map(self._record, self._rows(start, min(start + 1024, self._num_rows)))

    def _record(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**{key: row[key] for key in self._keep_nulls if key in row}, **without_nulls(row)}


def records_kind(config: RecordsConfig) -> str:
    """Return `config.kind`, with "auto" replaced by the kind that the path implies; without a path "auto" stays."""
    if config.kind != "auto" or config.path is None:
        return config.kind
    name = config.path.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    if name.endswith(JSONL_SUFFIXES):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "huggingface"


def open_records(config: RecordsConfig, limit: int | None = None, *, keep_nulls: Collection[str] = ()) -> Records:
    """Open the first `limit` records of a source.

    Args:
        config: The source, of kind jsonl, parquet or huggingface.
        limit: Use only the first records. None: all.
        keep_nulls: See `TableRecords`.

    Raises:
        ConfigError: There is no path.
        DataError: The source is missing or cannot be read.
    """
    kind = records_kind(config)
    if kind == "jsonl":
        return JsonlRecords(_existing_file(config), limit)
    if kind == "parquet":
        return _parquet(_existing_file(config), limit, keep_nulls)
    assert kind == "huggingface", kind
    return _hugging_face(config, limit, keep_nulls)


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a columnar format without the keys whose value is null, also within its lists and structs.

    All rows of a column share the keys of its structs, so a null says that the row does not have the key, as in JSONL.
    Only the content of a chat message stays, because every message must have it (a tool call has none).

    Example:
        >>> without_nulls({"messages": [{"role": "user", "name": None}], "tags": [1, None]})
        {'messages': [{'role': 'user'}], 'tags': [1, None]}
    """
    return {
        key: _without_nulls(value)
        for key, value in record.items()
        if value is not None or (key == "content" and "role" in record)
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return without_nulls(value)
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet(path: Path, limit: int | None, keep_nulls: Collection[str]) -> TableRecords:
    # pyarrow takes a second to import, so only runs on Parquet import it.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error

    def rows(start: int, stop: int) -> list[dict[str, Any]]:
        return table.slice(start, stop - start).to_pylist()

    num_rows = min(table.num_rows, limit or table.num_rows)
    return TableRecords(rows, list(table.column_names), num_rows, str(path), keep_nulls)


def _hugging_face(config: RecordsConfig, limit: int | None, keep_nulls: Collection[str]) -> TableRecords:
    loaded = _load_hugging_face(config)

    def rows(start: int, stop: int) -> list[dict[str, Any]]:
        columns = loaded[start:stop]
        return [dict(zip(columns, values)) for values in zip(*columns.values())]

    num_rows = min(len(loaded), limit or len(loaded))
    return TableRecords(rows, list(loaded.column_names), num_rows, config.path or "", keep_nulls)


def _existing_file(config: RecordsConfig) -> Path:
    if config.path is None:
        raise ConfigError(f"a data set of kind {config.kind!r} needs a path")
    path = Path(config.path).expanduser()
    if path.is_file():
        return path
    if path.exists():
        raise DataError(f"{path} is a directory; name a file in it, or use kind=huggingface for a directory of files")
    near = nearest_names(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else []
    raise DataError(f"data file {path} does not exist{f'; did you mean {near[0]!r}?' if near else ''}")


def _open_lines(path: Path) -> IO[bytes]:
    """Open the file's decompressed bytes, seekable. A plain file is not copied into memory."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                return io.BytesIO(stream.read())
        if path.suffix == ".zst":
            # pyarrow, a dependency of `datasets`, contains zstd; Python 3.11 does not.
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd") as stream:
                return io.BytesIO(stream.read())
        return path.open("rb")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def _as_data_error(path: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data set {path!r} cannot be loaded: {reason}") from error


def _load_hugging_face(config: RecordsConfig) -> Any:
    # `datasets` takes seconds to import, so only runs that use it import it.
    import datasets

    if config.path is None:
        raise ConfigError("a data set of kind 'huggingface' needs a path: a directory or a hub name")
    path = Path(config.path).expanduser()
    saved = path.is_dir() and any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    with _as_data_error(config.path):
        if saved:
            loaded = datasets.load_from_disk(str(path))
        else:
            # A split can also be a slice such as `train[:10%]`.
            location = str(path) if path.is_dir() else config.path
            loaded = datasets.load_dataset(location, config.name, split=config.split)
    if isinstance(loaded, datasets.Dataset):
        return loaded
    splits = list(loaded)
    if config.split is None and len(splits) == 1:
        return loaded[splits[0]]
    if config.split not in splits:
        what = "has several splits" if config.split is None else f"has no split {config.split!r}"
        raise DataError(f"data set {config.path!r} {what}; set data.*.split to one of {splits}")
    return loaded[config.split]
