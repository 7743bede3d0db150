"""What the driver calls on a generation worker, and what a worker does that has nothing better to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from nemo_rl.models.worker_process import process_facts

if TYPE_CHECKING:
    import torch

    from nemo_rl.models.generation.config import SamplingConfig
    from nemo_rl.models.generation.interfaces import GenerationResult
    from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate


class Generator(Protocol):
    """An engine in the worker's process; see `TorchGenerator`."""

    version: int | None

    def update_weights(self, update: WeightUpdate | WeightStream) -> str: ...

    def generate(
        self,
        input_ids: torch.Tensor,
        input_lengths: torch.Tensor,
        *,
        seed: int,
        num_generations: int,
        greedy: bool,
        sampling: SamplingConfig | None,
        first_prompt: int,
    ) -> GenerationResult: ...

    def attestation(self) -> dict[str, Any]: ...


GeneratorT = TypeVar("GeneratorT", bound=Generator)


class GenerationWorkerBase(ABC):
    """A worker that completes each batch as a whole and keeps its memory; subclasses override what they do better."""

    @abstractmethod
    def update_weights(self, update: WeightUpdate | WeightStream) -> str:
        """Load published weights; returns the digest over the memory that this worker computes with.

        Raises:
            WeightSyncError: they arrived damaged, or are another model's.
        """

    @abstractmethod
    def generate(
        self,
        prompts: dict[str, torch.Tensor],
        *,
        seed: int,
        num_generations: int,
        greedy: bool,
        sampling: SamplingConfig | None,
        first_prompt: int,
    ) -> GenerationResult:
        """Complete `prompts` (`input_ids`, `input_lengths`); the first is number `first_prompt` of the whole call."""

    def stream(
        self,
        prompts: dict[str, torch.Tensor],
        *,
        seed: int,
        num_generations: int,
        greedy: bool,
        sampling: SamplingConfig | None,
        first_prompt: int,
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        """`generate`, in pieces: positions in the whole call, and the completions of these prompts. Here in one."""
        result = self.generate(
            prompts,
            seed=seed,
            num_generations=num_generations,
            greedy=greedy,
            sampling=sampling,
            first_prompt=first_prompt,
        )
        yield list(range(first_prompt, first_prompt + len(prompts["input_lengths"]))), result

    def update_weights_in_flight(self, update: WeightUpdate | WeightStream) -> str:
        """`update_weights`, after the call that is under way."""
        return self.update_weights(update)

    def sleep(self, level: int = 1) -> None:  # noqa: B027 - what keeps its memory does nothing
        """Nothing to give back."""

    def wake(self, tags: list[str] | None = None) -> None:  # noqa: B027
        """Nothing to take again."""

    def attestation(self) -> dict[str, Any]:
        """What this worker runs on and with. Subclasses add `weights_version` and what else is worth knowing."""
        return process_facts()

    def shutdown(self) -> None:  # noqa: B027
        """Nothing to clean up: weights and caches go with the process."""


class GeneratorWorker(GenerationWorkerBase, Generic[GeneratorT]):
    """A worker whose engine, `_generator`, knows `update_weights`, `generate`, `attestation` and `version` itself."""

    _generator: GeneratorT

    def update_weights(self, update: WeightUpdate | WeightStream) -> str:
        """Load published weights; the digest over this worker's memory. See the engine's `update_weights`."""
        return self._generator.update_weights(update)

    def generate(
        self,
        prompts: dict[str, torch.Tensor],
        *,
        seed: int,
        num_generations: int,
        greedy: bool,
        sampling: SamplingConfig | None,
        first_prompt: int,
    ) -> GenerationResult:
        """See `GenerationWorkerBase.generate`."""
        return self._generator.generate(
            prompts["input_ids"],
            prompts["input_lengths"],
            seed=seed,
            num_generations=num_generations,
            greedy=greedy,
            sampling=sampling,
            first_prompt=first_prompt,
        )

    def attestation(self) -> dict[str, Any]:
        """What this worker runs on and with."""
        return {
            **super().attestation(),
            "weights_version": self._generator.version,
            **self._generator.attestation(),
        }
