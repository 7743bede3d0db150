import numpy as np
import pytest
import torch

from nemo_rl.data.collation import collate
from nemo_rl.data.problem import Problem
from nemo_rl.data.processing import TokenizedProblem

ITEMS = [
    TokenizedProblem(Problem("a", "1", 7, {"k": 1}), "a!", np.array([5], dtype=np.int32)),
    TokenizedProblem(Problem("b", "2", 3), "b!", np.array([6, 7, 8], dtype=np.int32)),
]


@pytest.mark.parametrize(("side", "first"), [("right", [5, 9, 9]), ("left", [9, 9, 5])])
def test_collate(side, first):
    batch = collate(ITEMS, pad_token_id=9, padding_side=side)
    assert batch["input_ids"].tolist() == [first, [6, 7, 8]]
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_lengths"].tolist() == [1, 3]
    assert batch["problem_index"].tolist() == [7, 3]
    assert batch["prompt"] == ["a!", "b!"]
    assert batch["answer"] == ["1", "2"]
    assert batch["metadata"] == [{"k": 1}, {}]
    assert batch.size == 2


def test_empty_batch_is_rejected():
    with pytest.raises(ValueError, match="at least one"):
        collate([], pad_token_id=0)
