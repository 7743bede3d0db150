"""Runs a job for supervised fine-tuning: the loop of `nemo_rl.algorithms.sft`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.data.conversations import load_conversations
from nemo_rl.jobs.command_line import JobArguments, run_command
from nemo_rl.jobs.record_job import RecordAttempt
from nemo_rl.jobs.training_job import run_training

if TYPE_CHECKING:
    from nemo_rl.algorithms.sft import SFT
    from nemo_rl.data.conversation_encoder import ConversationEncoder
    from nemo_rl.data.examples import ExampleDataset
    from nemo_rl.data.supervised import TokenizedConversations
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command line of supervised fine-tuning and return its exit code; see `run_command`."""
    return run_command(SFTJobConfig, "sft_embedded", run_sft, argv, program=program)


def run_sft(arguments: JobArguments[SFTJobConfig]) -> None:
    """Run a job for supervised fine-tuning, or print its plan with `--dry-run`."""
    run_training(SFTAttempt, arguments)


@dataclass(frozen=True)
class SFTAttempt(RecordAttempt[SFTJobConfig]):
    """Trains on conversations."""

    load_data = staticmethod(load_conversations)

    def tokenized(self, dataset: ExampleDataset[Any, Any], encoder: ConversationEncoder) -> TokenizedConversations:
        from nemo_rl.data.supervised import TokenizedConversations

        config = self.config
        return TokenizedConversations(dataset, encoder, config.policy.max_sequence_length, config.data.overlong)

    @staticmethod
    def collate(records: Sequence[Any], pad_token_id: int, multiple: int = 1) -> BatchedDataDict:
        from nemo_rl.data.supervised import collate_conversations

        return collate_conversations(records, pad_token_id, multiple)

    @staticmethod
    def loop_class() -> type[SFT]:
        from nemo_rl.algorithms.sft import SFT

        return SFT
