"""Checkpoints on disk."""

import contextlib
import json
import os
import sys

import pytest

from nemo_rl.errors import CheckpointError
from nemo_rl.utils.checkpoint import CheckpointingConfig, CheckpointStore


def store_in(path, **options):
    return CheckpointStore(path, CheckpointingConfig(**options))


def save(store, step, accuracy=None):
    def write(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "weights.bin").write_bytes(bytes([step]) * 100)

    metrics = {} if accuracy is None else {"val/accuracy": accuracy}
    return store.save(step, {"step": step}, metrics, write)


def test_latest_checkpoint_and_state(tmp_path):
    store = store_in(tmp_path)
    assert store.latest() is None
    save(store, 1)
    save(store, 2)
    latest = store.latest()
    assert latest.step == 2
    assert latest.state() == {"step": 2}
    assert (latest.path / "weights.bin").read_bytes() == b"\x02" * 100


def test_best_and_last_two_checkpoints_are_kept(tmp_path):
    store = store_in(tmp_path, keep_top_k=2)
    for step, accuracy in enumerate([0.1, 0.9, 0.8, 0.2, 0.3, 0.4], start=1):
        save(store, step, accuracy)
    assert [c.step for c in store.complete()] == [2, 3, 5, 6]
    assert store.best().step == 2


def test_lower_metric_can_be_better(tmp_path):
    store = store_in(tmp_path, keep_top_k=1, higher_is_better=False)
    for step, accuracy in enumerate([0.5, 0.1, 0.7, 0.8], start=1):
        save(store, step, accuracy)
    assert [c.step for c in store.complete()] == [2, 3, 4]


def test_checkpoints_without_metric_rank_last(tmp_path):
    store = store_in(tmp_path, keep_top_k=1)
    save(store, 1, 0.4)
    save(store, 2, float("nan"))
    save(store, 3)
    assert store.best().step == 1
    save(store, 4)
    assert [c.step for c in store.complete()] == [1, 3, 4]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), CheckpointError("worker 0: No space left")], ids=repr
)
def test_failed_save_leaves_the_previous_checkpoint(tmp_path, error):
    store = store_in(tmp_path)
    save(store, 1)

    def fail(directory):
        (directory / "half").write_text("x")
        raise error

    with pytest.raises(CheckpointError, match="No space left"):
        store.save(2, {}, {}, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_damaged_checkpoint_is_ignored(tmp_path, caplog, damage):
    store = store_in(tmp_path)
    save(store, 1)
    broken = save(store, 2).path
    if damage == "truncate":
        (broken / "weights.bin").write_bytes(b"")
    elif damage == "delete":
        (broken / "weights.bin").unlink()
    else:
        (broken / "checkpoint.json").write_text("{")
    assert store.latest().step == 1
    assert "step_000002" in caplog.text


def test_partial_checkpoint_is_removed_by_the_next_save(tmp_path):
    store = store_in(tmp_path)
    leftover = tmp_path / ".partial-step_000001"
    leftover.mkdir()
    (leftover / "checkpoint.json").write_text(json.dumps({"step": 1, "metrics": {}, "files": {}}))
    assert store.latest() is None
    save(store, 2)
    assert not leftover.exists()


def test_same_step_can_be_saved_again(tmp_path):
    store = store_in(tmp_path)
    save(store, 1)
    save(store, 1, 0.5)
    assert store.latest().metrics == {"val/accuracy": 0.5}


def run_with_fault(store, step, at, kind):
    """Save in a forked process; its `at`-th change of the file system kills it or fails. Returns whether it came."""

    def child():
        changes = 0

        def hook(event, _):
            nonlocal changes
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                changes += 1
                if changes == at:
                    if kind == "kill":
                        os._exit(1)
                    raise OSError(5, "Input/output error")

        sys.addaudithook(hook)
        with contextlib.suppress(CheckpointError):
            save(store, step, 0.9)
        os._exit(1 if changes >= at else 0)

    pid = os.fork()
    if not pid:
        try:
            child()
        finally:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1)
    return code == 1


@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("steps", [(1,), (1, 2, 3)], ids=["only", "last"])
def test_fault_while_a_step_is_saved_again(tmp_path, kind, steps):
    for at in range(1, 100):
        store = store_in(tmp_path / str(at), keep_top_k=1)
        for step in steps:
            save(store, step, 0.1)
        kept = [c.step for c in store.complete()]
        came = run_with_fault(store, steps[-1], at, kind)
        assert [c.step for c in store.complete()][-1] == steps[-1], at
        assert set(steps[-2:]) <= {c.step for c in store.complete()}, at
        for checkpoint in store.complete():
            assert checkpoint.state() == {"step": checkpoint.step}
            assert (checkpoint.path / "weights.bin").read_bytes() == bytes([checkpoint.step]) * 100
        save(store, steps[-1] + 1, 0.05)  # the next save removes all leftovers
        assert {c.step for c in store.complete()} <= {*kept, steps[-1] + 1}
        assert all(path.name.startswith("step_") for path in store.directory.iterdir())
        assert steps[-1] in [c.step for c in store.complete()]
        if not came:
            break
    assert at > 3


def test_failed_rename_restores_the_replaced_checkpoint(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    save(store, 1, 0.1)
    rename = os.rename

    def fail(source, target, **options):
        if ".partial-" in str(source):
            raise OSError(30, "Read-only file system")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="Read-only"):
        save(store, 1, 0.9)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert store.latest().metrics == {"val/accuracy": 0.1}


@pytest.mark.parametrize("complete_one", ["replaced", "final", "both"])
def test_killed_replacement_is_finished_by_the_next_save(tmp_path, complete_one):
    store = store_in(tmp_path)
    final = save(store, 1, 0.9).path
    replaced = tmp_path / ".replaced-step_000001"
    final.rename(replaced)
    save(store_in(tmp_path / "other"), 1, 0.5).path.rename(final)
    (tmp_path / "other").rmdir()
    if complete_one != "both":
        ((final if complete_one == "replaced" else replaced) / "checkpoint.json").unlink()
    accuracy = {"val/accuracy": 0.9 if complete_one == "replaced" else 0.5}
    assert [c.metrics for c in store.complete()] == [accuracy]
    save(store, 2)
    assert [c.metrics for c in store.complete()] == [accuracy, {}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_files_and_their_directories_are_flushed(tmp_path, monkeypatch):
    flushed = set()
    fsync = os.fsync

    def record(descriptor):
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)

    def write(directory):
        (directory / "policy" / "rank_0").mkdir(parents=True)
        (directory / "policy" / "rank_0" / "weights.bin").write_bytes(b"x")

    store_in(tmp_path).save(1, {}, {}, write)
    partial = str(tmp_path / ".partial-step_000001")
    names = ["", "/policy", "/policy/rank_0", "/policy/rank_0/weights.bin", "/state.json", "/checkpoint.json"]
    assert {partial + name for name in names} <= flushed
    assert str(tmp_path) in flushed


@pytest.mark.parametrize("first", [8, 98, 999_998, 9_999_998])
def test_steps_are_ordered_as_numbers(tmp_path, first):
    store = CheckpointStore(tmp_path, CheckpointingConfig(keep_top_k=1))
    steps = list(range(first, first + 5))
    for step in steps:
        store.save(step, {"step": step}, {"val/accuracy": -step}, lambda directory: None)
    assert [c.step for c in store.complete()] == [steps[0], *steps[-2:]]
    assert store.latest().step == steps[-1]


def test_directories_of_other_names_are_not_checkpoints(tmp_path):
    store = store_in(tmp_path, keep_top_k=1)
    save(store, 1, 0.9).path.rename(tmp_path / "step_000001.backup")
    for step in (2, 3, 4):
        save(store, step, 0.1)
    assert [c.step for c in store.complete()] == [3, 4]
    assert (tmp_path / "step_000001.backup" / "weights.bin").exists()
