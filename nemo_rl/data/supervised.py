"""Conversations as tokens, and batches of them, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from nemo_rl.data.conversation_encoder import ConversationEncoder, TokenizedConversation
from nemo_rl.data.conversations import Conversation
from nemo_rl.data.tokenized_examples import TokenizedExamples
from nemo_rl.distributed.batched_data_dict import BatchedDataDict


class TokenizedConversations(TokenizedExamples[Conversation, TokenizedConversation]):
    """Tokenizes all conversations of a data set; see `TokenizedExamples`."""

    items = "conversations"

    def _encode(
        self, encoder: ConversationEncoder, examples: Sequence[Conversation], where: Sequence[str]
    ) -> Iterable[Sequence[TokenizedConversation]]:
        return ([row] for row in encoder.encode(examples, where))

    def _item(self, position: int, rows: list[TokenizedConversation]) -> TokenizedConversation:
        return rows[0]


def collate_conversations(
    conversations: Sequence[TokenizedConversation], pad_token_id: int, row_multiple: int = 1
) -> BatchedDataDict:
    """Collate conversations into a training batch, padded on the right.

    Args:
        conversations: At least one conversation.
        pad_token_id: Pads rows to the length of the longest conversation.
        row_multiple: Rows are added until their number is a multiple of this; their `sample_mask` is 0.

    Returns:
        `input_ids`, `input_lengths`, `token_mask` and `sample_mask`, in the layout of `models.policy.interfaces`.
    """
    num_real = len(conversations)
    rows = [*conversations, *[conversations[0]] * (-num_real % row_multiple)]
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    input_ids = torch.full((len(rows), int(lengths.max())), pad_token_id)
    token_mask = torch.zeros(input_ids.shape)
    sample_mask = torch.zeros(len(rows))
    sample_mask[:num_real] = 1.0
    for index, row in enumerate(rows):
        input_ids[index, : lengths[index]] = torch.from_numpy(row.input_ids.astype(np.int64))
        token_mask[index, : lengths[index]] = torch.from_numpy(row.in_loss.astype(np.float32))
    return BatchedDataDict(input_ids=input_ids, input_lengths=lengths, token_mask=token_mask, sample_mask=sample_mask)
