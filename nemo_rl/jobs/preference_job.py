"""Jobs that train on preference pairs: what DPO and reward models share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_rl.data.preferences import load_preferences
from nemo_rl.jobs.record_job import ConfigT, RecordAttempt

if TYPE_CHECKING:
    from nemo_rl.data.conversation_encoder import ConversationEncoder
    from nemo_rl.data.examples import ExampleDataset
    from nemo_rl.data.preference_batches import TokenizedPairs
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict


@dataclass(frozen=True)
class PreferenceAttempt(RecordAttempt[ConfigT], ABC):
    """Trains on preference pairs."""

    load_data = staticmethod(load_preferences)

    def tokenized(self, dataset: ExampleDataset[Any, Any], encoder: ConversationEncoder) -> TokenizedPairs:
        from nemo_rl.data.preference_batches import TokenizedPairs

        config = self.config
        return TokenizedPairs(dataset, encoder, config.policy.max_sequence_length, config.data.overlong)

    @staticmethod
    def collate(records: Sequence[Any], pad_token_id: int, multiple: int = 1) -> BatchedDataDict:
        from nemo_rl.data.preference_batches import collate_pairs

        return collate_pairs(records, pad_token_id, multiple)
