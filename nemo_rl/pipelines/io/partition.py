"""Lists input files and partitions them into tasks of about equal size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Literal

from nemo_rl.errors import DataError
from nemo_rl.pipelines.io.files import (
    FileInfo,
    file_system,
    is_compressed,
    list_files,
    opened,
    parse_size,
    split_glob,
    would_list,
)
from nemo_rl.pipelines.stage import ProcessingStage
from nemo_rl.pipelines.tasks import EmptyTask, FileGroupTask

DEFAULT_TASK_SIZE = "32MiB"
# Assumed ratio of the size of text to its compressed size.
_COMPRESSION = 4

Part = tuple[str, tuple[int, int] | None, int]


class FilePartitioningStage(ProcessingStage[EmptyTask, FileGroupTask]):
    """Lists files and groups them into tasks of about `task_size`. Large files are split if `split` allows it.

    Args:
        paths: files, directories, glob patterns, or fsspec URLs.
        suffixes: suffixes of the files to list in a directory.
        split: "lines" (by bytes, at line ends), "row_groups" (Parquet), or None. Compressed files are not split.
        task_size: bytes of input per task, as a number or text such as "32MiB".
        dataset_name: defaults to the name of the first path.
    """

    runs_in_driver = True

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        suffixes: Sequence[str],
        split: Literal["lines", "row_groups"] | None = None,
        task_size: int | str = DEFAULT_TASK_SIZE,
        dataset_name: str = "",
    ) -> None:
        several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        self.paths = [os.fspath(path) for path in several]
        self.suffixes = list(suffixes)
        self.split = split
        self.task_size = parse_size(task_size)
        self.dataset_name = dataset_name or os.path.basename(self.paths[0].rstrip("/")) if self.paths else ""

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], []

    def prepare(self, resumes: bool) -> None:
        list_files(self.paths, self.suffixes)

    def reads_from(self) -> list[str]:
        return [split_glob(path)[0] for path in self.paths]

    def would_read(self, place: str) -> bool:
        return any(would_list(path, self.suffixes, place) for path in self.paths)

    def process(self, task: EmptyTask) -> list[FileGroupTask]:
        infos = list_files(self.paths, self.suffixes)
        versions = {info.url: f"{info.size} {info.version}" for info in infos}
        groups: list[list[Part]] = [[]]
        size = 0
        for part in (part for info in infos for part in self._parts(info)):
            if groups[-1] and size + part[2] > self.task_size:
                groups.append([])
                size = 0
            groups[-1].append(part)
            size += part[2]
        return [
            FileGroupTask(
                task_id=f"{self.dataset_name}-{number:05d}",
                dataset_name=self.dataset_name,
                data=[url for url, _, _ in group],
                _metadata={"versions": [versions[url] for url, _, _ in group]},
                parts=[part for _, part, _ in group],
            )
            for number, group in enumerate(groups)
        ]

    def _parts(self, info: FileInfo) -> Iterator[Part]:
        if is_compressed(info.url):
            yield info.url, None, info.size * _COMPRESSION
        elif self.split is None or info.size <= self.task_size:
            yield info.url, None, info.size
        elif self.split == "lines":
            for start in range(0, info.size, self.task_size):
                stop = min(start + self.task_size, info.size)
                yield info.url, (start, stop), stop - start
        else:
            yield from self._row_groups(info)

    def _row_groups(self, info: FileInfo) -> Iterator[Part]:
        import pyarrow
        import pyarrow.parquet

        try:
            with opened(info.url) as stream:
                metadata = pyarrow.parquet.read_metadata(stream)
        except pyarrow.ArrowException as error:
            raise DataError(f"{info.url} cannot be read as Parquet: {error}") from error
        start, size = 0, 0
        for index in range(metadata.num_row_groups):
            size += metadata.row_group(index).total_byte_size
            if size >= self.task_size or index + 1 == metadata.num_row_groups:
                yield info.url, (start, index + 1), size
                start, size = index + 1, 0


def line_number(url: str, offset: int) -> int:
    """Return the number, counted from 1, of the line that starts at byte `offset`."""
    files, path = file_system(url)
    count = 1
    with files.open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(offset, 1 << 20))):
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count
