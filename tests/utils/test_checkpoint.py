"""Checkpoints on disk."""

import json

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
