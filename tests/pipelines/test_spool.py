"""The spool, and the grouping of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_stages import full_disk

from nemo_rl.errors import DataError, PipelineError
from nemo_rl.pipelines import Task
from nemo_rl.pipelines.failures import FAILED_DIR, failed_tasks, withdraw_failures, write_failure
from nemo_rl.pipelines.items import Item, Key, chunks, group_size, grouped, key_text
from nemo_rl.pipelines.progress import WorkerCounts, read_counts
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
@given(st.lists(st.integers(0, 6), max_size=30), st.integers(1, 12), st.floats(0.5, 9, allow_subnormal=False))
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


@pytest.mark.parametrize("tail", ["cut", "zeros", "more zeros"])
def test_spool_is_read_up_to_the_last_complete_entry(tmp_path: Path, tail: str) -> None:
    writer = SpoolWriter(tmp_path / "full", 1)
    ends = [0]
    for index in range(3):
        writer.write([Entry("gone", (2 * index,))], [item(2 * index + 1)])
        (log,) = (tmp_path / "full").iterdir()
        ends.append(log.stat().st_size)
    content = log.read_bytes()
    for size in range(len(content) + 1):
        directory = tmp_path / f"{tail} {size}"
        directory.mkdir()
        damaged = content[:size]
        if tail != "cut":
            damaged += bytes(len(content) - size + (4096 if tail == "more zeros" else 0))
        path = directory / log.name
        path.write_bytes(damaged)
        path.chmod(0o600)
        spool = Spool.read(directory)
        keys = list(spool.attempts[1])
        assert keys == [(index,) for index in range(len(keys))]
        num_complete = max(index for index, end in enumerate(ends) if end <= size)
        assert 2 * num_complete <= len(keys) <= 2 * num_complete + 2
        for entry in spool.attempts[1].values():
            if entry.kind == "result":
                assert SpooledTask.from_entry(entry).load().data == list(entry.key)


@pytest.mark.parametrize("content", [b"", bytes(100), b'{"attempt": 2, "si'])
def test_damaged_list_of_frozen_attempts(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "01"
    SpoolWriter(place, 1).write([], [item(0)])
    freeze(tmp_path, 2)
    SpoolWriter(place, 2).write([], [item(1)])
    (tmp_path / "frozen.json").write_bytes(content)
    assert results(place, 2) == ([(1,)], [0])
    freeze(tmp_path, 3)
    assert results(place, 2) == ([(1,)], [0])


DAMAGE = {"empty": b"", "zeros": bytes(64), "half": b'{"stage": "a", "pla', "bytes": b"\xff\xfe"}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_record_of_a_failure_is_skipped(tmp_path: Path, damage: bytes) -> None:
    record = {"stage": "a", "task_id": "t", "error": "e", "traceback": "", "attempts": 1}
    failed = tmp_path / FAILED_DIR
    broken = write_failure(failed, {**record, "lineage": "0"}, item(0).task, [0, 0])
    write_failure(failed, {**record, "lineage": "1"}, item(1).task, [0, 1])
    broken.write_bytes(damage)
    (task,) = failed_tasks(tmp_path)
    assert task.load().data == [1]
    task.path.with_suffix(".task").write_bytes(damage)
    with pytest.raises(PipelineError, match="is incomplete"):
        task.load()
    withdraw_failures(failed, 0, set)
    assert failed_tasks(tmp_path) == []


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_counts_are_ignored(tmp_path: Path, damage: bytes) -> None:
    for index in range(2):
        worker = WorkerCounts(tmp_path)
        worker.counts.tasks_in = index + 1
        worker.save()
        if index == 0:
            next(tmp_path.iterdir()).write_bytes(damage)
    assert read_counts(tmp_path).tasks_in == 2
