"""What the algorithms know of a generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate


@dataclass(frozen=True)
class GenerationResult:
    """Completions of N prompts, in the order of the prompts.

    Attributes:
        output_ids: [N, T] int64, prompt and completion, padded on the right. A completion includes the
            end-of-sequence token, or the tokens of the stop string, that ended it.
        output_lengths: [N] int64, prompt + completion.
        prompt_lengths: [N] int64.
        logprobs: [N, T] float32. At completion tokens: the log-probability of the sampled token under the
            *untransformed* model distribution (temperature 1, before top-k and top-p), which is what the policy
            recomputes; 0 at prompt and padding.
        sampling_logprobs: [N, T] float32. The same under the distribution that was really sampled from (after
            temperature, top-k and top-p); 0 where greedy. Equal to `logprobs` at temperature 1 without top-k and top-p.
        truncated: [N] bool, True where the completion ended at the length limit.
        texts: the completions as text, special tokens left out.
        weights_version: version of the weights that generated them; the oldest one where they changed on the way.
    """

    output_ids: torch.Tensor
    output_lengths: torch.Tensor
    prompt_lengths: torch.Tensor
    logprobs: torch.Tensor
    sampling_logprobs: torch.Tensor
    truncated: torch.Tensor
    texts: list[str]
    weights_version: int


class GenerationInterface(ABC):
    """A generator that is spread over worker processes, seen from the driver."""

    @abstractmethod
    def generate(
        self,
        prompts: BatchedDataDict,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
    ) -> GenerationResult:
        """Complete prompts.

        Args:
            prompts: `input_ids` [N, P] int64 padded on the right, `input_lengths` [N].
            seed: together with a prompt's position it decides every draw, whatever the number of workers and the
                batch size: the same seed, prompts and weights give the same completions.
            num_generations: completions per prompt; results are ordered prompt by prompt (N * num_generations rows).
            greedy: take the likeliest token.
            sampling: overrides the configured temperature, top-p and top-k for this call.

        Raises:
            ModelError: a prompt leaves no room for a single new token.
            WeightSyncError: called before the first `update_weights`.
        """

    def stream(
        self,
        prompts: BatchedDataDict,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        """`generate`, in pieces: each prompt as soon as all its completions have ended, in whatever order they do.

        A generator that has no way to do that gives everything at the end.

        Yields:
            Positions in `prompts`, and the completions of these prompts in that order. All pieces together are what
            `generate` returns.
        """
        result = self.generate(prompts, seed=seed, num_generations=num_generations, greedy=greedy, sampling=sampling)
        yield list(range(len(prompts["input_lengths"]))), result

    @abstractmethod
    def update_weights(self, update: WeightUpdate | WeightOffer, *, in_flight: bool = False) -> str:
        """Load published weights on every worker; returns the digest computed over the workers' own memory.

        Args:
            update: what the policy published or offers.
            in_flight: do not wait for the end of calls that are under way, where the generator can: completions then go
                on with the new weights, and each token's log-probability is that of the weights that drew it.

        Raises:
            WeightSyncError: a worker's digest is not the sender's.
        """

    def sleep(self) -> None:  # noqa: B027 - what holds no memory that others need does nothing
        """Give the memory of the GPUs back until `wake`, weights being kept elsewhere. No call may come between."""

    def wake(self, tags: list[str] | None = None) -> None:  # noqa: B027
        """Take the memory again; the weights are those before `sleep`.

        Args:
            tags: only that of "weights", which can then be updated, or of the "kv_cache". None: all.
        """

    @abstractmethod
    def attestation(self) -> list[dict[str, Any]]:
        """Which worker runs where, in which venv: one record per worker."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop all workers. Idempotent."""
