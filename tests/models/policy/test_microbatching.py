from __future__ import annotations

import pytest
import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import DataError
from nemo_rl.models.policy.microbatching import microbatches, model_inputs


def batch_of(lengths: list[int], prompts: list[int], width: int = 8) -> BatchedDataDict:
    """A batch whose row r has the tokens 10 r + 1, 10 r + 2, ..."""
    position = torch.arange(width)
    inside = position < torch.tensor(lengths)[:, None]
    ids = (10 * torch.arange(len(lengths))[:, None] + position + 1) * inside
    mask = (inside & (position >= torch.tensor(prompts)[:, None])).float()
    return BatchedDataDict(
        input_ids=ids,
        input_lengths=torch.tensor(lengths),
        token_mask=mask,
        names=[f"row {r}" for r in range(len(lengths))],
    )


def test_fixed_micro_batches_are_truncated_to_longest_row() -> None:
    parts = list(microbatches(batch_of([3, 5, 2, 4, 7], [1] * 5), 2))
    assert [list(part["input_ids"].shape) for part in parts] == [[2, 5], [2, 4], [1, 7]]
    assert [list(part["token_mask"].shape) for part in parts] == [[2, 5], [2, 4], [1, 7]]
    assert [part["names"] for part in parts] == [["row 0", "row 1"], ["row 2", "row 3"], ["row 4"]]


def test_length_multiple_is_limited_by_the_width() -> None:
    parts = list(microbatches(batch_of([3, 5, 2, 7], [1] * 4), 2, length_multiple=3))
    assert [part["input_ids"].shape[1] for part in parts] == [6, 8]


def test_padded_inputs_keep_needed_columns_only() -> None:
    batch = batch_of([5, 6], [3, 4])
    inputs = model_inputs(batch, packed=False, only_loss_tokens=True)
    # Tokens 3 to 5 are in the loss of some row; columns 2 to 4 compute their logits.
    assert inputs.input_ids.tolist() == [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]]
    assert inputs.logits_to_keep == 3
    assert inputs.tokens.tolist() == [4, 5, 0, 14, 15, 16]
    scattered = inputs.scatter(torch.arange(1.0, 7.0))
    assert scattered.tolist() == [[0, 0, 0, 1, 2, 0, 0, 0], [0, 0, 0, 4, 5, 6, 0, 0]]


def test_packed_inputs_have_no_padding() -> None:
    batch = batch_of([5, 1, 3], [3, 1, 1])
    inputs = model_inputs(batch, packed=True, only_loss_tokens=True)
    assert inputs.input_ids.tolist() == [[1, 2, 3, 4, 11, 21, 22]]
    assert inputs.position_ids is not None
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1]]
    assert inputs.logits_to_keep.tolist() == [2, 3, 5, 6]  # type: ignore[union-attr]
    assert inputs.tokens.tolist() == [4, 5, 22, 23]
    scattered = inputs.scatter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert scattered.tolist() == [[0, 0, 0, 1, 2, 0, 0, 0], [0] * 8, [0, 3, 4, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("only_loss_tokens", [False, True])
def test_all_positions_but_the_first_are_scored(packed: bool, only_loss_tokens: bool) -> None:
    batch = batch_of([5, 1, 8], [1, 1, 1])
    inputs = model_inputs(batch, packed=packed, only_loss_tokens=only_loss_tokens)
    scattered = inputs.scatter(torch.ones(len(inputs.tokens)))
    assert scattered.tolist() == [[0, 1, 1, 1, 1, 0, 0, 0], [0] * 8, [0, 1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_micro_batch_without_loss_tokens_is_all_zero(packed: bool, width: int) -> None:
    batch = batch_of([1, 1], [1, 1], width=width)
    inputs = model_inputs(batch, packed=packed, only_loss_tokens=True)
    kept = inputs.logits_to_keep
    assert (kept if isinstance(kept, int) else len(kept)) == 1
    scattered = inputs.scatter(torch.ones(len(inputs.tokens), requires_grad=True))
    assert scattered.tolist() == [[0] * width] * 2
    assert scattered.requires_grad


@pytest.mark.parametrize("lengths", [[0, 3], [3, 9]])
def test_invalid_lengths_are_refused(lengths: list[int]) -> None:
    batch = batch_of([3, 3], [1, 1])
    batch["input_lengths"] = torch.tensor(lengths)
    with pytest.raises(DataError, match=rf"from {min(lengths)} to {max(lengths)} do not fit"):
        model_inputs(batch, packed=False, only_loss_tokens=False)
