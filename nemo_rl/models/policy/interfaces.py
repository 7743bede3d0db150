"""What the algorithms know of a policy, and what a policy worker knows of a loss.

Layout of a training batch (`BatchedDataDict`), B samples padded on the right to T tokens:

    input_ids                    [B, T] int64    prompt, completion, padding
    input_lengths                [B]    int64    prompt + completion
    token_mask                   [B, T] float32  1 on completion tokens that the loss counts
    sample_mask                  [B]    float32  0 leaves a whole sample out of the loss
    advantages                   [B]    float32
    generation_logprobs          [B, T] float32  what the generator reported when it sampled
    prev_logprobs                [B, T] float32  of the policy before the step; left out where that is the policy
                                                 being trained, which is so in the first update on a batch
    reference_policy_logprobs    [B, T] float32  only with a KL term

Every log-probability at [b, t] is that of token t given the tokens before it, at temperature 1 unless said
otherwise; position 0 is 0, and so is padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate


class LossFunction(Protocol):
    """A loss over one micro-batch; picklable, importable in the worker's venv.

    The worker sums the returned losses over micro-batches and ranks (gradients are summed, not averaged), so a loss
    normalises by the *global* counts that it is given: the result does not depend on micro-batch size or on the
    number of workers.
    """

    def __call__(
        self,
        logprobs: torch.Tensor,
        batch: Mapping[str, Any],
        global_num_tokens: torch.Tensor,
        global_num_samples: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of one micro-batch.

        Args:
            logprobs: [b, T] float32 with gradient, of the policy being trained.
            batch: the micro-batch, laid out as above.
            global_num_tokens: scalar; `(token_mask[:, 1:] * sample_mask[:, None]).sum()` over the optimizer batch.
            global_num_samples: scalar; `sample_mask.sum()` over the optimizer batch.

        Returns:
            The scalar loss, and detached scalar metrics that add up over micro-batches and ranks
            (each already divided by a global count). A name ending in `_max` or `_min` is reduced so instead.
        """
        ...


@dataclass(frozen=True)
class TrainResult:
    """What one call of `train` did.

    Attributes:
        metrics: scalars of the call: `loss`, `grad_norm` (before clipping), `lr`, and the loss function's own,
            reduced over micro-batches and ranks and averaged over optimizer steps.
        num_optimizer_steps: optimizer steps taken by this call.
        num_tokens: tokens in the forward passes, without padding.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    num_optimizer_steps: int = 1
    num_tokens: int = 0


class PolicyInterface(ABC):
    """A policy that is spread over worker processes, seen from the driver. Calls block until all workers are done."""

    @abstractmethod
    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        """Log-probabilities of `input_ids` under the current weights, [B, T] float32, in the order of the batch."""

    @abstractmethod
    def get_reference_policy_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        """The same under the weights the run started from (they are loaded at the first call or when configured)."""

    @abstractmethod
    def train(self, batch: BatchedDataDict, loss_fn: LossFunction) -> TrainResult:
        """Take one optimizer step per `train_global_batch_size` samples of the batch, in the batch's order.

        Raises:
            NonFiniteError: a loss or gradient norm is not finite; the weights are as before that optimizer step.
        """

    @abstractmethod
    def publish_weights(self, version: int, dtype: str) -> WeightUpdate:
        """Make the current weights available to generation workers, cast to `dtype` ("float32", "bfloat16")."""

    def offer_weights(self, version: int, dtype: str) -> WeightUpdate | WeightOffer:
        """The same for receivers that load them before the policy trains on: they may then be sent while they are
        loaded, which takes less memory and time. A policy that has no way to do that publishes them."""
        return self.publish_weights(version, dtype)

    def offload(self, *, keep_weights: bool = False) -> None:  # noqa: B027 - what shares no memory does nothing
        """Give the devices' memory to generation: gradients are dropped, optimizer state and weights go to the host.

        Every other call brings back what it needs. Sending weights, and log-probabilities of the reference policy, let
        go of it again when they are done.

        Args:
            keep_weights: they are about to be sent.

        Raises:
            TrainingError: a host has not enough memory.
        """

    @abstractmethod
    def save_checkpoint(self, directory: Path) -> None:
        """Write model (safetensors that `transformers` loads, with tokenizer), optimizer, schedule and RNG states."""

    @abstractmethod
    def load_checkpoint(self, directory: Path) -> None:
        """Restore what `save_checkpoint` wrote. Raises `CheckpointError` when it does not fit this policy."""

    @abstractmethod
    def attestation(self) -> list[dict[str, Any]]:
        """Which worker runs where, in which venv: one record per worker."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop all workers. Idempotent."""
