"""Data sets from files and from Hugging Face, and the registry of all kinds of data sets."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from nemo_rl.data.arithmetic import ArithmeticDataset
from nemo_rl.data.problem import Problem, ProblemDataset, Role, problem_from_record, without_nulls
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.utils.names import nearest_names, suggest_or_list

if TYPE_CHECKING:
    from nemo_rl.data.config import DataConfig, DatasetConfig

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = (".gz", ".zst")


class JsonlDataset(ProblemDataset):
    """Reads one JSON object per line, plain or compressed (.gz, .zst). Empty lines are skipped.

    Memory holds the offset of each line, and for a compressed file the decompressed bytes.
    """

    def __init__(self, path: Path, config: DatasetConfig) -> None:
        self._path, self._config = path, config
        self._offsets, self._line_numbers = array("q"), array("q")
        self._file = _open_lines(path)
        limit = config.max_num_problems
        offset = 0
        for line_number, line in enumerate(self._file, start=1):
            if line_number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]  # a byte order mark that some editors write
                offset = 3
            if line.strip():
                self._parsed(line, line_number, len(self._offsets))
                self._offsets.append(offset)
                self._line_numbers.append(line_number)
                if len(self._offsets) == limit:
                    break
            offset += len(line)

    @classmethod
    def from_config(cls, config: DatasetConfig, data: DataConfig, role: Role) -> Self:
        return cls(_existing_file(config), config)

    def __len__(self) -> int:
        return len(self._offsets)

    def problem(self, index: int) -> Problem:
        self._file.seek(self._offsets[index])
        return self._parsed(self._file.readline(), self._line_numbers[index], index)

    def where(self, index: int) -> str:
        return f"{self._path}:{self._line_numbers[index]}"

    def _parsed(self, line: bytes, line_number: int, index: int) -> Problem:
        where = f"{self._path}:{line_number}"
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
        return problem_from_record(record, index, self._config, where)


class TableDataset(ProblemDataset):
    """Reads one record per row of an Arrow table; a row is converted to Python objects when it is read.

    Args:
        rows: `rows(start, stop)` returns a list of records. A null in a record means that it lacks the key.
        columns: Names of the columns.
        num_rows: Number of rows of the table.
        config: Column names and limits.
        name: Name of the table in messages.
    """

    def __init__(self, rows: Any, columns: list[str], num_rows: int, config: DatasetConfig, name: str) -> None:
        self._rows: Callable[[int, int], list[dict[str, Any]]] = rows
        self._config, self._name = config, name
        self._num_rows = min(num_rows, config.max_num_problems or num_rows)
        for option, key in (("prompt_key", config.prompt_key), ("answer_key", config.answer_key)):
            if key not in columns:
                raise DataError(f"{name}: no column {key!r} (data.*.{option}){suggest_or_list(key, columns)}")
        for start in range(0, self._num_rows, 1024):
            for index, record in enumerate(self._rows(start, min(start + 1024, self._num_rows)), start=start):
                self._problem(record, index)

    def __len__(self) -> int:
        return self._num_rows

    def problem(self, index: int) -> Problem:
        (record,) = self._rows(index, index + 1)
        return self._problem(record, index)

    def _problem(self, record: dict[str, Any], index: int) -> Problem:
        required = {key: record[key] for key in (self._config.prompt_key, self._config.answer_key)}
        # A required key stays even if it is null, so that the message says so.
        return problem_from_record({**required, **without_nulls(record)}, index, self._config, self.where(index))

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"


class ParquetDataset(TableDataset):
    """Reads a Parquet file."""

    @classmethod
    def from_config(cls, config: DatasetConfig, data: DataConfig, role: Role) -> Self:
        # pyarrow takes a second to import, so only runs on Parquet import it.
        import pyarrow
        import pyarrow.parquet

        path = _existing_file(config)
        try:
            table = pyarrow.parquet.read_table(path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error

        def rows(start: int, stop: int) -> list[dict[str, Any]]:
            return table.slice(start, stop - start).to_pylist()

        return cls(rows, list(table.column_names), table.num_rows, config, str(path))


class HuggingFaceDataset(TableDataset):
    """Loads a data set with the `datasets` library: a saved directory, a directory of data files, or a hub name."""

    @classmethod
    def from_config(cls, config: DatasetConfig, data: DataConfig, role: Role) -> Self:
        loaded = _load_hugging_face(config)
        name = config.path or ""

        def rows(start: int, stop: int) -> list[dict[str, Any]]:
            columns = loaded[start:stop]
            return [dict(zip(columns, values)) for values in zip(*columns.values())]

        return cls(rows, list(loaded.column_names), len(loaded), config, name)


class SeedDataset(ProblemDataset):
    """Problems that are only a seed, for environments that make their own tasks.

    `data.*.max_num_problems` says how many there are (default: 4096 for training, 256 for validation). The seeds of
    training count from 0 and those of validation from 2**31, so they have none in common.
    """

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count

    @classmethod
    def from_config(cls, config: DatasetConfig, data: DataConfig, role: Role) -> Self:
        if role == "train":
            return cls(0, config.max_num_problems or 4096)
        return cls(2**31, config.max_num_problems or 256)

    def __len__(self) -> int:
        return self._count

    def problem(self, index: int) -> Problem:
        return Problem("", "", index, {"seed": self._first + index})

    def where(self, index: int) -> str:
        return f"seed {self._first + index}"


# To add a kind of data set, write one class and one line here (or set `data.train.kind: package.module:Class`).
DATASETS: dict[str, type[ProblemDataset]] = {
    "arithmetic": ArithmeticDataset,
    "seeds": SeedDataset,
    "jsonl": JsonlDataset,
    "parquet": ParquetDataset,
    "huggingface": HuggingFaceDataset,
}


def load_datasets(data: DataConfig) -> tuple[ProblemDataset, ProblemDataset | None]:
    """Open a job's train data and its validation data, if any.

    Without a `validation` section, a job on generated problems or seeds uses those of the validation split.

    Example:
        >>> from nemo_rl.data.config import DataConfig
        >>> train, validation = load_datasets(DataConfig(arithmetic={"num_train": 100, "num_validation": 10}))
        >>> len(train), len(validation)
        (100, 10)
    """
    train = open_dataset(data.train, data, "train")
    return train, open_validation(data)


def open_validation(data: DataConfig) -> ProblemDataset | None:
    """Open a job's validation data as `load_datasets` does, without the train data. None: there are none."""
    validation = data.validation
    if validation is None and dataset_kind(data.train) in ("arithmetic", "seeds"):
        validation = data.train.model_copy(update={"max_num_problems": None})
    return None if validation is None else open_dataset(validation, data, "validation")


def open_dataset(config: DatasetConfig, data: DataConfig, role: Role) -> ProblemDataset:
    """Open one data set and check its records.

    Raises:
        ConfigError: `kind` is unknown.
        DataError: The data set is missing or empty, or a record is invalid.
    """
    dataset = _dataset_class(dataset_kind(config), role).from_config(config, data, role)
    if not len(dataset):
        raise DataError(f"data.{role}: {config.path or config.kind} contains no problems")
    return dataset


def dataset_kind(config: DatasetConfig) -> str:
    """Return `config.kind`, with "auto" replaced by the kind that the path implies."""
    if config.kind != "auto":
        return config.kind
    if config.path is None:
        return "arithmetic"
    name = config.path.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    if name.endswith(JSONL_SUFFIXES):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "huggingface"


def _dataset_class(kind: str, role: Role) -> type[ProblemDataset]:
    if kind in DATASETS:
        return DATASETS[kind]
    module_name, colon, class_name = kind.partition(":")
    if not colon:
        hint = suggest_or_list(kind, ["auto", *DATASETS])
        raise ConfigError(
            f"data.{role}.kind: unknown kind {kind!r}{hint} For your own class, use package.module:Class."
        )
    try:
        dataset_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"data.{role}.kind: {kind!r} cannot be imported: {error}") from error
    if not (isinstance(dataset_class, type) and issubclass(dataset_class, ProblemDataset)):
        raise ConfigError(f"data.{role}.kind: {kind!r} is not a subclass of nemo_rl.data.problem.ProblemDataset")
    return dataset_class


def _existing_file(config: DatasetConfig) -> Path:
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


def _load_hugging_face(config: DatasetConfig) -> Any:
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
