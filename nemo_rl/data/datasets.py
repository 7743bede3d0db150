"""Data sets of problems, and the registry of all their kinds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

from nemo_rl.data.arithmetic import ArithmeticDataset
from nemo_rl.data.problem import Problem, ProblemDataset, Role, problem_from_record
from nemo_rl.data.records import Records, open_records, records_kind
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.utils.names import suggest_or_list

if TYPE_CHECKING:
    from nemo_rl.data.config import DataConfig, DatasetConfig

ClassT = TypeVar("ClassT")


class RecordDataset(ProblemDataset):
    """Makes a problem of each record of a file or a Hugging Face data set.

    Args:
        records: The records.
        config: Names of the keys.
    """

    def __init__(self, records: Records, config: DatasetConfig) -> None:
        self._records, self._config = records, config
        for option, key in (("prompt_key", config.prompt_key), ("answer_key", config.answer_key)):
            if records.columns is not None and key not in records.columns:
                hint = suggest_or_list(key, records.columns)
                raise DataError(f"{records.name}: no column {key!r} (data.*.{option}){hint}")
        for index, record in enumerate(records):
            self._problem(record, index)

    @classmethod
    def from_config(cls, config: DatasetConfig, data: DataConfig, role: Role) -> Self:
        # A required key stays even if it is null, so that the message says so.
        keys = (config.prompt_key, config.answer_key)
        return cls(open_records(config, config.max_num_problems, keep_nulls=keys), config)

    def __len__(self) -> int:
        return len(self._records)

    def problem(self, index: int) -> Problem:
        return self._problem(self._records.record(index), index)

    def where(self, index: int) -> str:
        return self._records.where(index)

    def _problem(self, record: dict[str, Any], index: int) -> Problem:
        return problem_from_record(record, index, self._config, self.where(index))


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
    "jsonl": RecordDataset,
    "parquet": RecordDataset,
    "huggingface": RecordDataset,
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
    kind = dataset_kind(config)
    dataset_class = find_dataset_class(kind, DATASETS, ProblemDataset, key=f"data.{role}.kind")  # type: ignore[type-abstract]
    dataset = dataset_class.from_config(config, data, role)
    if not len(dataset):
        raise DataError(f"data.{role}: {config.path or config.kind} contains no problems")
    return dataset


def dataset_kind(config: DatasetConfig) -> str:
    """Return `config.kind`, with "auto" replaced by the kind that the path implies."""
    kind = records_kind(config)
    return "arithmetic" if kind == "auto" else kind


def find_dataset_class(kind: str, known: Mapping[str, type[ClassT]], base: type[ClassT], *, key: str) -> type[ClassT]:
    """Return the class of a kind of data set: one of `known`, or `package.module:Class`, a subclass of `base`.

    Raises:
        ConfigError: There is no such class; the message begins with the configuration `key`.
    """
    if kind in known:
        return known[kind]
    module_name, colon, class_name = kind.partition(":")
    if not colon:
        hint = suggest_or_list(kind, ["auto", *known])
        raise ConfigError(f"{key}: unknown kind {kind!r}{hint} For your own class, use package.module:Class.")
    try:
        dataset_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}: {kind!r} cannot be imported: {error}") from error
    if not (isinstance(dataset_class, type) and issubclass(dataset_class, base)):
        raise ConfigError(f"{key}: {kind!r} is not a subclass of {base.__module__}.{base.__qualname__}")
    return dataset_class
