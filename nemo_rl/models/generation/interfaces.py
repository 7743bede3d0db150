"""The generation interface that algorithms use, with its request and its result.

The driver calls a `GenerationInterface`. Inside, one `GenerationRequest` travels from the driver to the workers and
their engines, and one `GenerationResult` travels back.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_rl.distributed.batches.batch_values import from_pickled, to_pickled
from nemo_rl.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt
    import torch

    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate


@dataclass(frozen=True)
class GenerationRequest:
    """Holds N prompts and says how to complete them.

    Attributes:
        input_ids: [N, P] int64 prompt tokens, padded on the right.
        input_lengths: [N] int64 prompt lengths.
        seed: Seed of every draw. A draw depends on the seed, the position of its row and the token index only.
        num_generations: Completions per prompt. Results are ordered prompt by prompt (N * num_generations rows).
        greedy: Take the likeliest token at each step.
        sampling: Replaces the configured temperature, top-p and top-k for this request.
        first_prompt: Position of the first of these prompts in the driver's call, of which this request may be a part.
        rows: For each prompt, the row whose random stream draws its tokens, instead of its position. Needs
            `num_generations=1`. A caller that completes samples in several calls, in any order, gives each its own row.
    """

    input_ids: torch.Tensor
    input_lengths: torch.Tensor
    seed: int
    num_generations: int = 1
    greedy: bool = False
    sampling: SamplingConfig | None = None
    first_prompt: int = 0
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and (self.num_generations != 1 or len(self.rows) != self.num_prompts):
            raise ValueError(
                f"rows need one completion per prompt and one row for each: got {len(self.rows)} rows, "
                f"{self.num_prompts} prompts and num_generations={self.num_generations}"
            )

    @classmethod
    def for_prompts(
        cls, prompts: BatchedDataDict, *, rows: Sequence[int] | None = None, **options: Any
    ) -> GenerationRequest:
        """Make the request of a call of `GenerationInterface`; `options` are the other attributes."""
        return cls(
            prompts["input_ids"], prompts["input_lengths"], rows=None if rows is None else tuple(rows), **options
        )

    @property
    def num_prompts(self) -> int:
        """Number of prompts, N."""
        return len(self.input_lengths)

    @property
    def positions(self) -> list[int]:
        """Positions of these prompts in the driver's call."""
        return list(range(self.first_prompt, self.first_prompt + self.num_prompts))

    def random_rows(self) -> npt.NDArray[np.int64]:
        """Return the row of the random stream of each completion, [N * num_generations]; see `row_uniforms`."""
        if self.rows is not None:
            return np.asarray(self.rows, np.int64)
        return np.arange(self.num_prompts * self.num_generations) + self.first_prompt * self.num_generations

    def prompts(self) -> list[list[int]]:
        """Return the tokens of each prompt, without padding."""
        lengths = self.input_lengths.tolist()
        return [row[:length] for row, length in zip(self.input_ids.tolist(), lengths, strict=True)]

    def part(self, start: int, end: int) -> GenerationRequest:
        """Return the request for prompts `start` to `end - 1` of this one; their draws stay the same."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[start:end],
            input_lengths=self.input_lengths[start:end],
            first_prompt=self.first_prompt + start,
            rows=None if self.rows is None else self.rows[start:end],
        )

    def check_prompt_lengths(self, max_sequence_length: int) -> None:
        """Raise `ModelError` for the first prompt that is empty or leaves no room for a new token.

        The driver checks a request before it calls a worker, and each generator checks it again.

        Args:
            max_sequence_length: Longest prompt plus completion, in tokens.
        """
        for index, length in zip(self.positions, self.input_lengths.tolist(), strict=True):
            if length == 0:
                raise ModelError(f"prompt {index} is empty; a completion needs at least one token to start from")
            if length >= max_sequence_length:
                raise ModelError(
                    f"prompt {index} has {length} tokens and leaves no room for a new one: prompt and completion "
                    f"together may have {max_sequence_length} (policy.max_sequence_length)"
                )


@dataclass(frozen=True)
class GenerationResult:
    """Holds the completions of N prompts, in the order of the prompts.

    Attributes:
        output_ids: [N, T] int64, prompt and completion, padded on the right. A completion includes the
            end-of-sequence token or the tokens of the stop string that ended it.
        output_lengths: [N] int64, prompt + completion.
        prompt_lengths: [N] int64.
        logprobs: [N, T] float32. At completion tokens: the log-probability of the sampled token under
            softmax(logits / temperature), before top-k and top-p; at temperature 1 where greedy. The policy recomputes
            the same quantity. 0 at prompt and padding.
        sampling_logprobs: [N, T] float32. The log-probability of the sampled token under the distribution it was drawn
            from, after temperature, top-k and top-p; 0 where greedy. Equal to `logprobs` without top-k and top-p.
        truncated: [N] bool, True where the completion ended at the length limit.
        texts: The completions as text, without special tokens.
        weights_version: Version of the weights that generated them. If the weights changed during the call, the oldest
            version.
        routed_experts: [N, T, L * K] int16, the experts of all tokens but the last, 0 behind them; see
            `models.routed_experts`. None unless `policy.generation.router_replay` is set.
    """

    output_ids: torch.Tensor
    output_lengths: torch.Tensor
    prompt_lengths: torch.Tensor
    logprobs: torch.Tensor
    sampling_logprobs: torch.Tensor
    truncated: torch.Tensor
    texts: list[str]
    weights_version: int
    routed_experts: torch.Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # For Ray, as `BatchedDataDict` does it: torch's own way takes several times as long.
        return _unpickled_result, ([to_pickled(getattr(self, field.name)) for field in dataclasses.fields(self)],)


def _unpickled_result(values: list[Any]) -> GenerationResult:
    return GenerationResult(*map(from_pickled, values))


class GenerationInterface(ABC):
    """Completes prompts with the current policy, on any number of workers.

    Example:

        generation.update_weights(policy.publish_weights(version=1, dtype="float32"))
        result = generation.generate(prompts, seed=0, num_generations=8)
        print(result.texts[0])
    """

    @abstractmethod
    def generate(
        self,
        prompts: BatchedDataDict,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
        rows: Sequence[int] | None = None,
    ) -> GenerationResult:
        """Complete prompts.

        Args:
            prompts: `input_ids` [N, P] int64 padded on the right, `input_lengths` [N].
            seed: Together with a prompt's position it decides every draw, whatever the number of workers and the
                batch size: the same seed, prompts and weights give the same completions.
            num_generations: Completions per prompt; results are ordered prompt by prompt (N * num_generations rows).
            greedy: Take the likeliest token.
            sampling: Overrides the configured temperature, top-p and top-k for this call.
            rows: See `GenerationRequest.rows`.

        Raises:
            ModelError: A prompt leaves no room for a single new token.
            WeightSyncError: `update_weights` has not been called yet.
        """

    def stream(
        self,
        prompts: BatchedDataDict,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        """Complete prompts, and yield each prompt as soon as all its completions have ended, in any order.

        The default implementation yields everything at the end.

        Yields:
            Positions in `prompts`, and the completions of these prompts in that order. All parts together are what
            `generate` returns.
        """
        result = self.generate(
            prompts, seed=seed, num_generations=num_generations, greedy=greedy, sampling=sampling, rows=rows
        )
        yield list(range(len(prompts["input_lengths"]))), result

    @property
    def max_concurrent_calls(self) -> int:
        """Number of calls of `stream` that run at a time, from different threads. Further ones wait."""
        return 1

    @abstractmethod
    def update_weights(self, update: WeightUpdate | WeightOffer, *, in_flight: bool = False) -> str:
        """Load the policy's weights on every worker.

        Args:
            update: What the policy published or offers.
            in_flight: Do not wait for running calls to end, where the generator supports it. Completions then
                continue with the new weights, and each token's log-probability is that of the weights that drew it.

        Returns:
            The digest that the workers computed over the memory they generate with.

        Raises:
            WeightSyncError: A worker's digest differs from the sender's.
        """

    def sleep(self) -> None:  # noqa: B027 - a generator without memory to release does nothing
        """Release GPU memory until `wake`; the weights are kept elsewhere. Do not call `generate` in between."""

    def wake(self, tags: list[str] | None = None) -> None:  # noqa: B027
        """Allocate GPU memory again. The weights are those before `sleep`.

        Args:
            tags: Only the memory of the "weights", which can then be updated, or of the "kv_cache". None: both.
        """

    @abstractmethod
    def attestation(self) -> list[dict[str, Any]]:
        """Return one record per worker: where it runs and in which venv."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop all workers. Idempotent."""
