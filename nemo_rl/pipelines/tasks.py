"""Defines tasks, the units of work that stages exchange.

A task is pickled whenever it is sent from one stage to the next. The two processes may run different versions of the
same library. A `DocumentBatch` is therefore sent as an Arrow stream, whose format is stable, and not as a pickled
frame.
"""

from __future__ import annotations

import copy
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from nemo_rl.errors import DataError

if TYPE_CHECKING:
    import pandas
    import pyarrow

T = TypeVar("T")


@dataclass(frozen=True)
class StagePerf:
    """Records the time that one stage spent on a task.

    Attributes:
        stage: name of the stage.
        process_s: seconds of the call that processed the task.
        num_tasks: number of tasks in that call.
        worker: host and process id.
    """

    stage: str
    process_s: float
    num_tasks: int
    worker: str


@dataclass
class Task(Generic[T]):
    """Represents a unit of work. Subclass it for other kinds of data; new fields need defaults or `kw_only=True`.

    Example:
        >>> Task("t1", "demo", [1, 2, 3]).num_items
        3

    Attributes:
        task_id: name chosen by the user, for messages and file names. It need not be unique.
        dataset_name: name of the data set.
        data: the content.
    """

    task_id: str
    dataset_name: str
    data: T
    _metadata: dict[str, Any] = field(default_factory=dict)
    _stage_perf: list[StagePerf] = field(default_factory=list)
    # Set by the framework. Unique in a run, and the same when the run is repeated or resumed. Names a writer's shard.
    _lineage: str = field(default="", kw_only=True, compare=False)

    @property
    def num_items(self) -> int:
        """Number of items in the task, such as documents or files; 1 if the data has no length."""
        return len(self.data) if isinstance(self.data, Sized) and not isinstance(self.data, str | bytes) else 1

    @property
    def num_bytes(self) -> int:
        """Approximate size in memory; 0 if it is small or unknown."""
        if isinstance(self.data, str | bytes):
            return len(self.data)
        return int(getattr(self.data, "nbytes", 0))

    def fresh(self) -> Self:
        """Return a copy that a stage may modify."""
        return copy.deepcopy(self)

    def frozen(self) -> Self:
        """Return the task in the form in which it is sent. Raises `DataError` if its data cannot be sent."""
        return self


@dataclass
class EmptyTask(Task[None]):
    """Holds no data. The first stage receives it if the run has no initial tasks."""

    task_id: str = "empty"
    dataset_name: str = "empty"
    data: None = None

    @property
    def num_items(self) -> int:
        return 0


@dataclass
class FileGroupTask(Task[list[str]]):
    """Refers to files, or parts of files.

    Attributes:
        data: paths or fsspec URLs.
        parts: the part of each file: `(start, stop)` in bytes (JSONL) or row groups (Parquet), or None for the entire
            file. An empty list selects every file entirely.
    """

    parts: list[tuple[int, int] | None] = field(default_factory=list)


class DocumentBatch(Task[Any]):
    """Holds documents as the rows of a pandas frame or an Arrow table.

    `data` keeps its type (frame or table) when the batch is sent to another process. A frame's index is not sent.

    Example:
        >>> import pyarrow
        >>> DocumentBatch("b1", "demo", pyarrow.table({"text": ["one", "two"]}))
        DocumentBatch('b1', 2 rows, columns=['text'])
    """

    # At least one is set. If both are, the frame counts, because a caller may have modified it.
    _frame: Any
    _table: Any

    def __init__(
        self,
        task_id: str,
        dataset_name: str,
        data: pandas.DataFrame | pyarrow.Table,
        _metadata: dict[str, Any] | None = None,
        _stage_perf: list[StagePerf] | None = None,
        *,
        _lineage: str = "",
    ) -> None:
        self.task_id = task_id
        self.dataset_name = dataset_name
        self._metadata = {} if _metadata is None else _metadata
        self._stage_perf = [] if _stage_perf is None else _stage_perf
        self._lineage = _lineage
        self.data = data

    def __repr__(self) -> str:
        return f"DocumentBatch({self.task_id!r}, {self.num_items} rows, columns={self.columns})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DocumentBatch):
            return NotImplemented
        same_ids = (self.task_id, self.dataset_name) == (other.task_id, other.dataset_name)
        return same_ids and bool(self.to_pyarrow().equals(other.to_pyarrow()))

    __hash__ = None  # type: ignore[assignment]

    @property
    def data(self) -> Any:
        """The documents as a pandas frame or an Arrow table."""
        if self._frame is None and self._is_pandas:
            self._frame = self._table.to_pandas()
        return self._frame if self._is_pandas else self._table

    @data.setter
    def data(self, data: Any) -> None:
        kind = type(data).__module__.partition(".")[0], type(data).__name__
        if kind not in (("pandas", "DataFrame"), ("pyarrow", "Table")):
            raise DataError(
                f"the data of a DocumentBatch must be a pandas DataFrame or a pyarrow Table, not {'.'.join(kind)}"
            )
        self._is_pandas = kind[0] == "pandas"
        self._frame, self._table = (data, None) if self._is_pandas else (None, data)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the documents as a frame. If the batch holds a frame, returns that frame, not a copy."""
        frame: pandas.DataFrame = self.data if self._is_pandas else self._table.to_pandas()
        return frame

    def to_pyarrow(self) -> pyarrow.Table:
        """Return the documents as a table, without the frame's index.

        Raises:
            DataError: Arrow has no type for a column of the frame, such as numbers mixed with text.
        """
        if self._frame is None:
            return self._table
        import pyarrow

        try:
            return pyarrow.Table.from_pandas(self._frame, preserve_index=False)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(part) for part in error.args)
            raise DataError(f"batch {self.task_id!r} cannot be turned into an Arrow table: {reason}") from error

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        held = self._frame if self._frame is not None else self._table
        return [str(name) for name in (held.columns if self._frame is not None else held.column_names)]

    @property
    def num_items(self) -> int:
        return len(self._frame) if self._frame is not None else int(self._table.num_rows)

    @property
    def num_bytes(self) -> int:
        return int(self.to_pyarrow().nbytes)

    def with_data(self, data: pandas.DataFrame | pyarrow.Table) -> DocumentBatch:
        """Return a copy of the batch (id, metadata, history) with other documents."""
        result = self.fresh()
        result.data = data
        return result

    def frozen(self) -> DocumentBatch:
        result = copy.copy(self)
        result._table, result._frame = self.to_pyarrow(), None
        return result

    def fresh(self) -> DocumentBatch:
        result = copy.copy(self)
        result._metadata = copy.deepcopy(self._metadata)
        result._stage_perf = list(self._stage_perf)
        if self._frame is not None:
            result._frame = self._frame.copy()
        return result

    def __getstate__(self) -> dict[str, Any]:
        import pyarrow

        table = self.to_pyarrow()
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        # A buffer, not bytes: Ray reads it from shared memory without a copy.
        return {**self.__dict__, "_frame": None, "_table": sink.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import pyarrow

        self.__dict__.update(state)
        with pyarrow.ipc.open_stream(state["_table"]) as reader:
            self._table = reader.read_all()
