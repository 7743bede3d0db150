"""The interface between algorithms and a policy, and between a policy worker and a loss.

Layout of a training batch (`BatchedDataDict`) with B samples, padded on the right to T tokens:

    input_ids                    [B, T] int64    prompt, completion, padding
    input_lengths                [B]    int64    prompt + completion
    token_mask                   [B, T] float32  1 for completion tokens in the loss
    sample_mask                  [B]    float32  0 excludes the whole sample from the loss
    advantages                   [B]    float32, or [B, T] if they differ by token
    generation_logprobs          [B, T] float32  of the generator when it sampled, before top-p and top-k
    sampling_logprobs            [B, T] float32  of the generator after top-p and top-k; absent without them
    prev_logprobs                [B, T] float32  of the policy before the step; absent in the first update on a
                                                 batch, where they equal those of the policy being trained
    reference_policy_logprobs    [B, T] float32  only with a KL term
    teacher_logprobs             [B, T] float32  of a teacher; distillation on sampled tokens only
    top_ids                      [B, T, K] int32 K tokens at each position; distillation on top-k only. The loss then
                                                 gets the log-probabilities of these tokens (see `LossFunction`)
    routed_experts               [B, T, L * K] int16  of generation, which the policy's routers take; only with router
                                                 replay (`models.routed_experts`)
    teacher_top_logprobs         [B, T, K + 1] float32  of a teacher: of these tokens, and of all others together

The log-probability at [b, t] is that of token t given the tokens before it, under softmax(logits / temperature) with
the temperature of generation (`policy.generation.temperature`): training optimises the distribution that was sampled
from. This includes the reference policy, as in TRL (`GRPOTrainer._get_per_token_logps_and_entropies`) and verl
(`compute_ref_log_prob`), so the KL divergence is that of the distributions that the two policies would sample from.
Position 0 and padding are 0.
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
    """Computes the loss of one micro-batch. It must be picklable, and importable in the worker's venv.

    The worker sums losses and gradients over micro-batches and ranks and never averages them. So a loss divides by the
    *global* counts that it gets, and the result depends neither on the micro-batch size nor on the number of workers.

    A loss with an attribute `rows_per_group` gets that many successive rows of the batch in one micro-batch, in order:
    a loss on pairs of rows has 2. `policy.train_micro_batch_size` must be a multiple of it.

    Example:
        The policy gradient, averaged over tokens::

            def policy_gradient(logprobs, batch, global_num_tokens, global_num_samples):
                mask = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
                values = logprobs[:, 1:] * batch["advantages"][:, None] * mask
                return -values.sum() / global_num_tokens, {}
    """

    def __call__(
        self,
        logprobs: torch.Tensor,
        batch: Mapping[str, Any],
        global_num_tokens: torch.Tensor,
        global_num_samples: torch.Tensor,
        /,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return loss and metrics of one micro-batch.

        Args:
            logprobs: [b, T] float32 with gradient, of the policy being trained. If the batch has `top_ids`:
                [b, T, K + 1], of these tokens, and of all other tokens together. Of a reward model: the rewards, [b].
            batch: the micro-batch, in the layout above.
            global_num_tokens: scalar; `(token_mask[:, 1:] * sample_mask[:, None]).sum()` over the optimizer batch.
            global_num_samples: scalar; `sample_mask.sum()` over the optimizer batch.

        Returns:
            The scalar loss, and detached scalar metrics, already divided by a global count, which are summed over
            micro-batches and ranks. A metric whose name ends in `_max` or `_min` takes the maximum or minimum.
        """
        ...


def rows_per_group(loss_fn: LossFunction) -> int:
    """Return how many successive rows a loss needs in one micro-batch; see `LossFunction`."""
    return getattr(loss_fn, "rows_per_group", 1)


@dataclass(frozen=True)
class TrainResult:
    """Describes one call of `train`.

    Attributes:
        metrics: `loss`, `grad_norm` (before clipping), `lr`, and the metrics of the loss function, reduced over
            micro-batches and ranks and averaged over optimizer steps.
        num_optimizer_steps: optimizer steps taken by this call.
        num_tokens: tokens in the forward passes, without padding.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    num_optimizer_steps: int = 1
    num_tokens: int = 0


class PolicyInterface(ABC):
    """Controls a policy over its worker processes from the driver. Calls block until all workers are done."""

    @abstractmethod
    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        """Return log-probabilities of `input_ids` under the current weights, [B, T] float32, in the batch's order.

        A batch with a `logprob_mask` needs only those where it is 1; the others may be 0.
        """

    @abstractmethod
    def get_reference_policy_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        """Return log-probabilities under the initial weights of the run, which the first call loads."""

    def get_scores(self, batch: BatchedDataDict) -> torch.Tensor:
        """Return the rewards of the conversations in `input_ids`, [B] float32. Only of a policy with a reward model."""
        raise NotImplementedError(f"{type(self).__name__} has no reward model")

    @property
    def data_parallel_size(self) -> int:
        """Number of workers that a batch is divided among; the rows of an optimizer step are a multiple of it."""
        return 1

    @abstractmethod
    def train(self, batch: BatchedDataDict, loss_fn: LossFunction, *, batch_size: int | None = None) -> TrainResult:
        """Take one optimizer step per `batch_size` rows of the batch, in the batch's order.

        Args:
            batch: the training batch.
            loss_fn: the loss.
            batch_size: rows per optimizer step. None: `policy.train_global_batch_size`, or all rows.

        Raises:
            NonFiniteError: a loss or gradient norm is not finite. The weights are as before that optimizer step.
        """

    @abstractmethod
    def publish_weights(self, version: int, dtype: str) -> WeightUpdate:
        """Publish the current weights for any generation workers, cast to `dtype` ("float32", "bfloat16").

        They stay as they are when the policy trains on. Those of LoRA are merged.
        """

    def offer_weights(self, version: int, dtype: str, *, lasting: bool = False) -> WeightUpdate | WeightOffer:
        """Offer the current weights to the policy's own generation workers, in the way that costs least.

        They may be streamed while they are loaded, or only the adapters of LoRA may be sent. A policy that can do
        neither publishes them.

        Args:
            version: see `publish_weights`.
            dtype: see `publish_weights`.
            lasting: receivers may load them after the next call of `train`. Then they are not streamed.
        """
        return self.publish_weights(version, dtype)

    def offload(self, *, keep_weights: bool = False) -> None:  # noqa: B027 - optional
        """Free the devices' memory for generation: drop gradients, move optimizer state and weights to the host.

        Every other call brings back what it needs. Sending weights, and log-probabilities of the reference policy, move
        it to the host again afterwards.

        Args:
            keep_weights: leave the weights on the devices, because they are about to be sent.

        Raises:
            TrainingError: a host has not enough memory.
        """

    @abstractmethod
    def save_checkpoint(self, directory: Path) -> None:
        """Write model (safetensors that `transformers` loads, with tokenizer), optimizer, schedule and RNG states."""

    @abstractmethod
    def load_checkpoint(self, directory: Path) -> None:
        """Restore what `save_checkpoint` wrote. Raises `CheckpointError` if it does not fit this policy."""

    @abstractmethod
    def attestation(self) -> list[dict[str, Any]]:
        """Return one record per worker: where it runs, in which venv, with which software."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop all workers. Idempotent."""
