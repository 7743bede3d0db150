"""Collates tokenized problems into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from nemo_rl.data.processing import TokenizedProblem
from nemo_rl.distributed.batched_data_dict import BatchedDataDict


def collate(
    problems: Sequence[TokenizedProblem], pad_token_id: int, padding_side: Literal["left", "right"] = "right"
) -> BatchedDataDict:
    """Collate problems into a batch with one row per problem, in order.

    Args:
        problems: At least one problem.
        pad_token_id: Pads rows to the length of the longest prompt.
        padding_side: Side of the padding; generation workers need "right".

    Returns:
        `input_ids` int64 [batch, longest prompt], `input_lengths` int64 [batch], `problem_index` int64 [batch], and the
        lists `prompt` (the text that the model reads), `question` (the prompt before templates: text, or chat
        messages), `answer` and `metadata`.
    """
    if not problems:
        raise ValueError("collate needs at least one problem.")
    lengths = torch.tensor([len(problem.input_ids) for problem in problems])
    input_ids = torch.full((len(problems), int(lengths.max())), pad_token_id)
    for row, problem in zip(input_ids, problems):
        ids = torch.tensor(problem.input_ids, dtype=torch.long)
        if padding_side == "right":
            row[: len(ids)] = ids
        else:
            row[len(row) - len(ids) :] = ids
    return BatchedDataDict(
        input_ids=input_ids,
        input_lengths=lengths,
        problem_index=torch.tensor([problem.problem.index for problem in problems]),
        prompt=[problem.text for problem in problems],
        question=[problem.problem.prompt for problem in problems],
        answer=[problem.problem.answer for problem in problems],
        metadata=[problem.problem.metadata for problem in problems],
    )
