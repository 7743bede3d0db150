"""The generation worker: one `Generator` in one Ray actor."""

from __future__ import annotations

import dataclasses
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_rl import settings
from nemo_rl.models.worker_process import process_facts, take_cpu_share
from nemo_rl.utils.garbage import gc_paused

if TYPE_CHECKING:
    from nemo_rl.models.generation.generator import Generator, GeneratorSpec
    from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
    from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate


class GenerationWorker(ABC):
    """Runs a generator in its own process. A backend's worker class only says how to make the generator.

    Example:

        class MyGenerationWorker(GenerationWorker):
            def make_generator(self, spec: GeneratorSpec) -> MyGenerator:
                return MyGenerator(spec)

    Args:
        spec: Which model to complete prompts with, and how. The worker sets `spec.name`.
        num_local_workers: Workers on this node that share its CPUs.
    """

    def __init__(self, spec: GeneratorSpec, *, num_local_workers: int = 1) -> None:
        with gc_paused():
            if not spec.use_gpu:
                take_cpu_share(spec.config.num_threads, num_local_workers)
            name = f"generation worker {settings.RANK.get()} on {socket.gethostname()}"
            self.generator = self.make_generator(dataclasses.replace(spec, name=name))

    @abstractmethod
    def make_generator(self, spec: GeneratorSpec) -> Generator:
        """Make the generator. The constructor calls this once, in the worker's process."""

    def update_weights(self, update: WeightUpdate | WeightStream) -> str:
        """Load weights; returns the digest over this worker's memory. See `Generator.update_weights`."""
        return self.generator.update_weights(update)

    def update_weights_in_flight(self, update: WeightUpdate | WeightStream) -> str:
        """Load weights without waiting for a running call, where the backend can. Here: after the running call."""
        return self.generator.update_weights(update)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Complete the prompts of a request. See `Generator.generate`."""
        return self.generator.generate(request)

    def stream(self, request: GenerationRequest) -> Iterator[tuple[list[int], GenerationResult]]:
        """Complete the prompts of a request, and yield them as their completions end. See `Generator.stream`."""
        yield from self.generator.stream(request)

    def sleep(self, level: int = 1) -> None:
        """Release GPU memory until `wake`. See `Generator.sleep`."""
        self.generator.sleep(level)

    def wake(self, tags: list[str] | None = None) -> None:
        """Allocate GPU memory again. See `Generator.wake`."""
        self.generator.wake(tags)

    def attestation(self) -> dict[str, Any]:
        """Return where this worker runs, its weights version, and what its generator computes with."""
        return {**process_facts(), "weights_version": self.generator.version, **self.generator.attestation()}

    def shutdown(self) -> None:
        """Stop the generator; the worker cannot be used afterwards."""
        self.generator.shutdown()
