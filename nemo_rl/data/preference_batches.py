"""Preference pairs as tokens, and batches of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from nemo_rl.data.conversation_encoder import ConversationEncoder, TokenizedConversation
from nemo_rl.data.examples import ExampleDataset
from nemo_rl.data.preferences import PreferencePair
from nemo_rl.data.supervised import collate_conversations
from nemo_rl.data.tokenized_examples import TokenizedExamples
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import DataError

# Rows of a pair in a batch: the chosen answer, the rejected one.
ROWS_PER_PAIR = 2


@dataclass(frozen=True)
class TokenizedPair:
    """The tokens of a preference pair.

    Attributes:
        position: Position of the pair among the pairs of its data set.
    """

    chosen: TokenizedConversation
    rejected: TokenizedConversation
    margin: float
    position: int


class TokenizedPairs(TokenizedExamples[PreferencePair, TokenizedPair]):
    """Tokenizes all preference pairs of a data set; see `TokenizedExamples`.

    A pair is too long if one of its conversations is. A truncated one is dropped if an answer is cut off completely,
    or if its conversations are then equal.
    """

    items = "pairs"
    _rows_per_example = ROWS_PER_PAIR

    def __init__(
        self,
        dataset: ExampleDataset[Any, PreferencePair],
        encoder: ConversationEncoder,
        max_length: int,
        overlong: str = "error",
    ) -> None:
        self._margins = array("d")
        super().__init__(dataset, encoder, max_length, overlong)

    def _encode(
        self, encoder: ConversationEncoder, examples: Sequence[PreferencePair], where: Sequence[str]
    ) -> Iterator[Sequence[TokenizedConversation]]:
        chosen = encoder.encode([pair.chosen for pair in examples], [f"{place} (chosen)" for place in where])
        rejected = encoder.encode([pair.rejected for pair in examples], [f"{place} (rejected)" for place in where])
        for place, *rows in zip(where, chosen, rejected):
            if _are_equal(*rows):
                raise DataError(
                    f"{place}: both answers have the same tokens, so neither is better; remove the record, or use a "
                    "chat template that shows what differs"
                )
            yield rows

    def _is_useful(self, rows: Sequence[TokenizedConversation]) -> bool:
        return super()._is_useful(rows) and not _are_equal(*rows)

    def _keep(self, example: PreferencePair, digest: xxhash.xxh3_64) -> None:
        self._margins.append(example.margin)
        digest.update(self._margins[-1:].tobytes())

    def _item(self, position: int, rows: list[TokenizedConversation]) -> TokenizedPair:
        return TokenizedPair(rows[0], rows[1], self._margins[position], position)


def _are_equal(one: TokenizedConversation, other: TokenizedConversation) -> bool:
    return np.array_equal(one.input_ids, other.input_ids)


def collate_pairs(pairs: Sequence[TokenizedPair], pad_token_id: int, pair_multiple: int = 1) -> BatchedDataDict:
    """Collate preference pairs into a training batch: two successive rows per pair, the chosen one first.

    Args:
        pairs: At least one pair.
        pad_token_id: See `collate_conversations`.
        pair_multiple: Pairs are added until their number is a multiple of this; their `sample_mask` is 0.

    Returns:
        The keys of `collate_conversations`, and `margin` [rows] float32 and `position` [rows] int64 (see
        `TokenizedPair`), which are equal in both rows of a pair.
    """
    padded = [*pairs, *[pairs[0]] * (-len(pairs) % pair_multiple)]
    batch = collate_conversations([row for pair in padded for row in (pair.chosen, pair.rejected)], pad_token_id)
    batch["sample_mask"][ROWS_PER_PAIR * len(pairs) :] = 0.0
    batch["margin"] = torch.tensor([pair.margin for pair in padded]).repeat_interleave(ROWS_PER_PAIR)
    batch["position"] = torch.tensor([pair.position for pair in padded]).repeat_interleave(ROWS_PER_PAIR)
    return batch
