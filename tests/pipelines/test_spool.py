"""The spool, and the grouping of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_stages import full_disk

from nemo_rl.errors import DataError, PipelineError
from nemo_rl.pipelines import Task
from nemo_rl.pipelines.items import Item, Key, chunks, group_size, grouped, key_text
from nemo_rl.pipelines.spool import Entry, Spool, SpooledTask, SpooledTasks, SpoolWriter, freeze


def item(*key: int) -> Item:
    return Item(Task(key_text(key), "d", list(key)), key)


def results(directory: Path, num_sources: int) -> tuple[list[Key], list[int]]:
    entries, missing = Spool.read(directory).results(num_sources)
    return [entry.key for entry in entries], missing


def test_source_is_done_with_its_tree(tmp_path: Path) -> None:
    first, second = SpoolWriter(tmp_path, 1), SpoolWriter(tmp_path, 1)
    first.write([Entry("fan", (0,), 2), Entry("gone", (1,))], [item(0, 0)])
    assert results(tmp_path, 3) == ([], [0, 2])
    second.write([Entry("fan", (0, 1), 2), Entry("gone", (0, 1, 0))], [item(0, 1, 1)])
    assert results(tmp_path, 3) == ([(0, 0), (0, 1, 1)], [2])


def test_repeated_work_counts_once(tmp_path: Path) -> None:
    for _ in range(2):
        SpoolWriter(tmp_path, 1).write([Entry("fan", (0,), 2)], [item(0, 0), item(0, 1)])
    SpoolWriter(tmp_path, 2).write([], [item(0)])
    assert results(tmp_path, 1) == ([(0, 0), (0, 1)], [])


def test_attempts_are_not_mixed(tmp_path: Path) -> None:
    """Another attempt may have split a task differently."""
    SpoolWriter(tmp_path, 1).write([Entry("fan", (0,), 2)], [item(0, 0)])
    SpoolWriter(tmp_path, 2).write([], [item(0, 1)])
    assert results(tmp_path, 1) == ([], [0])


def test_late_entries_of_old_attempts_are_ignored(tmp_path: Path) -> None:
    place = tmp_path / "01"
    late, new = SpoolWriter(place, 1), SpoolWriter(place, 1)
    late.write([], [item(0)])
    freeze(tmp_path, 2)
    late.write([Entry("gone", (1,))])
    new.write([Entry("gone", (2,))])
    assert results(place, 3) == ([(0,)], [1, 2])
    second = SpoolWriter(place, 2)
    second.write([], [item(1)])
    assert results(place, 3) == ([(0,), (1,)], [2])
    freeze(tmp_path, 2)  # an attempt that did not start
    freeze(tmp_path, 3)
    second.write([], [item(2)])
    assert results(place, 3) == ([(0,), (1,)], [2])
    assert Spool.read(place).removed_keys(3) == set()


def test_truncated_entry_is_ignored(tmp_path: Path) -> None:
    SpoolWriter(tmp_path, 1).write([], [item(0), item(1)])
    (path,) = tmp_path.glob("*.log")
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        keys, missing = results(tmp_path, 2)
        assert (keys, missing) in (([], [0, 1]), ([(0,)], [1]))
    path.write_bytes(content)
    assert results(tmp_path, 2) == ([(0,), (1,)], [])


def test_partial_write_is_rolled_back(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, 1)
    writer.write([], [item(0)])
    (path,) = tmp_path.glob("*.log")
    size = path.stat().st_size
    for room in (0, 5, 40):
        with full_disk(size + room), pytest.raises(DataError, match="cannot be written"):
            writer.write([], [item(1)])
        assert path.stat().st_size == size
    writer.write([], [item(2)])
    assert results(tmp_path, 3) == ([(0,), (2,)], [1])


def test_spooled_tasks_load_on_access(tmp_path: Path) -> None:
    SpoolWriter(tmp_path, 1).write([], [item(i) for i in range(5)])
    entries, _ = Spool.read(tmp_path).results(5)
    tasks = SpooledTasks(entries)
    assert len(tasks) == 5
    assert [task.data for task in tasks] == [[0], [1], [2], [3], [4]]
    assert [task.data for task in tasks[3:]] == [[3], [4]]
    (path,) = tmp_path.glob("*.log")
    path.unlink()
    with pytest.raises(PipelineError, match="must be on a file system that all of them share"):
        SpooledTask.from_entry(entries[0]).load()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=30), st.integers(1, 12), st.floats(0.5, 9))
def test_groups_keep_item_order(sizes: list[int], given: int, cpus: float) -> None:
    batches = [[item(i, j) for j in range(size)] for i, size in enumerate(sizes)]
    groups = list(grouped(batches, given, cpus))
    assert [i.key for group in groups for i in group] == [i.key for batch in batches for i in batch]
    assert all(groups)


def test_groups_split_the_output_of_one_task() -> None:
    assert [len(group) for group in grouped([[item(0, i) for i in range(1000)]], 1, 2)] == [125] * 8
    assert [len(group) for group in grouped([[item(i)] for i in range(32)], 32, 2)] == [32]
    large = [[Item(Task("t", "d", b"x" * 2**20), (i,))] for i in range(3)]
    assert [len(group) for group in grouped(large, 32, 2)] == [1, 1, 1]


def test_group_sizes_are_multiples_of_the_batch_size() -> None:
    assert group_size(1000, 2, 1) == 125
    assert group_size(16, 2, 8) == 8
    assert group_size(0, 2, 1) == 1
    assert list(chunks([1, 2, 3], 2)) == [[1, 2], [3]]
