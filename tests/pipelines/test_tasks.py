"""Tasks and document batches."""

from __future__ import annotations

import pickle

import pandas as pd
import pyarrow as pa
import pytest

from nemo_rl.pipelines import DocumentBatch, EmptyTask, FileGroupTask, Task

FRAME = pd.DataFrame({"text": ["a", "b", "ü"], "n": [1, 2, 3]})


@pytest.mark.parametrize("data", [FRAME, pa.Table.from_pandas(FRAME)])
def test_batch_keeps_its_type_when_pickled(data: pd.DataFrame | pa.Table) -> None:
    batch = DocumentBatch(task_id="t", dataset_name="d", data=data, _metadata={"k": 1}, _stage_perf=[])
    again = pickle.loads(pickle.dumps(batch))
    assert type(again.data) is type(data)
    assert again == batch
    assert (again.task_id, again.dataset_name, again._metadata, again.num_items) == ("t", "d", {"k": 1}, 3)
    assert again.columns == ["text", "n"]
    pd.testing.assert_frame_equal(again.to_pandas(), FRAME)
    assert again.to_pyarrow().equals(pa.Table.from_pandas(FRAME, preserve_index=False).cast(again.to_pyarrow().schema))


def test_frames_are_pickled_as_arrow() -> None:
    """Another version of pandas could not read a pickled frame."""
    content = pickle.dumps(DocumentBatch("t", "d", FRAME))
    assert b"pandas.core" not in content
    assert b"DataFrame" not in content


def test_frame_index_is_not_pickled() -> None:
    batch = DocumentBatch("t", "d", FRAME[FRAME["n"] > 1])
    assert list(pickle.loads(pickle.dumps(batch)).to_pandas().index) == [0, 1]


def test_fresh_copy_is_independent() -> None:
    batch = DocumentBatch("t", "d", FRAME.copy(), _metadata={"k": 1})
    for original in (batch, batch.frozen(), pickle.loads(pickle.dumps(batch))):
        copy = original.fresh()
        copy.data["n"] += 1
        copy._metadata["k"] = 2
        assert list(original.to_pandas()["n"]) == [1, 2, 3]
        assert original._metadata == {"k": 1}
        assert list(pickle.loads(pickle.dumps(copy)).to_pandas()["n"]) == [2, 3, 4]


def test_with_data_keeps_metadata() -> None:
    batch = DocumentBatch("t", "d", FRAME, _metadata={"k": 1}).with_data(FRAME[:1])
    assert (batch.task_id, batch._metadata, batch.num_items) == ("t", {"k": 1}, 1)


def test_num_items_and_num_bytes() -> None:
    assert EmptyTask().num_items == 0
    assert FileGroupTask("t", "d", ["a", "b"]).num_items == 2
    assert [Task("t", "d", data).num_items for data in ([1, 2, 3], "text", 7)] == [3, 1, 1]
    assert [Task("t", "d", data).num_bytes for data in (b"1234", 7)] == [4, 0]
    assert DocumentBatch("t", "d", FRAME).num_bytes > 20
