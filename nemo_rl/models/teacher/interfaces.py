"""The interface between algorithms and a teacher, a frozen model that scores the tokens of its student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from nemo_rl.distributed.batched_data_dict import BatchedDataDict


class TeacherInterface(ABC):
    """Controls a teacher over its worker processes from the driver. Calls block until all workers are done.

    A batch has the layout of `models.policy.interfaces`. Log-probabilities are those of softmax(logits / temperature)
    with the temperature of the student's generation. They are defined where `token_mask` is 1; elsewhere they may be 0.
    """

    @abstractmethod
    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        """Return log-probabilities of `input_ids`, [B, T] float32, in the batch's order."""

    @abstractmethod
    def get_top_logprobs(self, batch: BatchedDataDict, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `k` most probable tokens at each position, and their log-probabilities.

        Returns:
            The tokens, [B, T, k] int32, all of which the student knows; and [B, T, k + 1] float32, their
            log-probabilities, and in the last column that of all other tokens together.
        """

    @abstractmethod
    def attestation(self) -> list[dict[str, Any]]:
        """Return one record per worker: where it runs, in which venv, with which software."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop all workers. Idempotent."""
