"""The base class of generators: a generator completes prompts with one model, in the process of one worker.

A backend implements `Generator`; `worker.GenerationWorker` runs it in a Ray actor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_rl.errors import ModelError, WeightSyncError
from nemo_rl.models.generation.config import GeneratorSpec
from nemo_rl.models.generation.stop import StopRules, end_of_sequence_ids

if TYPE_CHECKING:
    from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
    from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate

__all__ = ["Generator", "GeneratorSpec"]  # what a backend's generator is written with


class Generator(ABC):
    """Completes prompts with one model in this process.

    The constructor reads the model's configuration and tokenizer. Weights come with `update_weights`. A subclass
    implements `update_weights` and `generate`, and overrides the other methods where its engine can do better.

    Attributes:
        spec: What the generator was made from.
        model_config: The model's Hugging Face configuration.
        tokenizer: The tokenizer.
        stop: When a completion ends.
        version: Version of the loaded weights; None before the first update and after a failed one.

    Raises:
        ModelError: The model's configuration or the tokenizer cannot be read.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        from transformers import AutoConfig, AutoTokenizer

        try:
            self.model_config: Any = AutoConfig.from_pretrained(spec.model_name)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(spec.tokenizer_name or spec.model_name)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the model {spec.model_name!r}: {error}") from error
        self.spec = spec
        end_ids = end_of_sequence_ids(spec.model_name, self.model_config, self.tokenizer)
        self.stop = StopRules(self.tokenizer, end_ids | set(spec.config.stop_token_ids), spec.config.stop_strings)
        self.version: int | None = None

    @abstractmethod
    def update_weights(self, update: WeightUpdate | WeightStream) -> str:
        """Load weights and set `version`.

        Returns:
            The digest over the memory that this generator computes with.

        Raises:
            WeightSyncError: The weights arrived damaged or belong to another model. `version` is then None, or the old
                weights stay.
        """

    @abstractmethod
    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Complete the prompts of a request.

        Raises:
            ModelError: A prompt is empty or leaves no room for a new token.
            WeightSyncError: No weights are loaded.
        """

    def stream(self, request: GenerationRequest) -> Iterator[tuple[list[int], GenerationResult]]:
        """Complete the prompts of a request, and yield them as their completions end. Here all of them at the end.

        Yields:
            Positions of prompts in the driver's call, and their completions in that order.
        """
        yield request.positions, self.generate(request)

    def weights_version(self) -> int:
        """Return the version of the loaded weights. Raises `WeightSyncError` if no weights are loaded."""
        if self.version is None:
            raise WeightSyncError(f"{self.spec.name} has no weights: call update_weights before generate")
        return self.version

    def sleep(self, level: int = 1) -> None:  # noqa: B027 - a generator that keeps its memory does nothing
        """Release GPU memory until `wake`. Level 1 keeps the weights in host memory, level 2 drops them."""

    def wake(self, tags: list[str] | None = None) -> None:  # noqa: B027
        """Allocate the memory of "weights" or "kv_cache" again; None allocates both."""

    def attestation(self) -> dict[str, Any]:
        """Return what this generator computes with."""
        return {"precision": self.spec.precision, "device": self.spec.device}

    def shutdown(self) -> None:  # noqa: B027 - weights and caches go with the process
        """Stop the engine; the generator cannot be used afterwards."""
