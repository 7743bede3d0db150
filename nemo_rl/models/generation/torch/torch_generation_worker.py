"""One generation worker: a `TorchGenerator` in a Ray actor. Runs in the BASE venv."""

from __future__ import annotations

import gc
import os
import platform
import socket
import sys
from collections.abc import Iterator
from typing import Any

import torch

from nemo_rl import settings
from nemo_rl.models.generation.config import GenerationConfig, SamplingConfig
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.weights.interfaces import WeightUpdate


class TorchGenerationWorker:
    """Completes its share of every call's prompts.

    Args:
        model_name: Hugging Face directory or hub name.
        config: how to sample and when to stop.
        max_sequence_length: longest prompt plus completion, in tokens.
        tokenizer_name: None: the model's own.
        precision: "float32" or "bfloat16"; `config.precision` wins.
        use_gpu: compute on the GPU that this worker was given.
        num_local_workers: workers on this node, which share its CPUs.
    """

    def __init__(
        self,
        model_name: str,
        config: GenerationConfig,
        *,
        max_sequence_length: int,
        tokenizer_name: str | None = None,
        precision: str = "float32",
        use_gpu: bool = False,
        num_local_workers: int = 1,
    ) -> None:
        if not use_gpu:
            share = len(os.sched_getaffinity(0)) // num_local_workers
            torch.set_num_threads(config.num_threads or max(1, share))
        self._generator = TorchGenerator(
            model_name,
            config,
            max_sequence_length=max_sequence_length,
            tokenizer_name=tokenizer_name,
            precision=precision,
            device="cuda" if use_gpu else "cpu",
            name=f"generation worker {settings.RANK.get()} on {socket.gethostname()}",
        )
        # Modules live as long as the process: without this each full collection of garbage walks through all of them.
        gc.collect()
        gc.freeze()

    def update_weights(self, update: WeightUpdate) -> str:
        """Load published weights; the digest over this worker's memory. See `TorchGenerator.update_weights`."""
        return self._generator.update_weights(update)

    def update_weights_in_flight(self, update: WeightUpdate) -> str:
        """`update_weights`, after the call that is under way: this decoder cannot change weights on the way."""
        return self.update_weights(update)

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
        return self._generator.generate(
            prompts["input_ids"],
            prompts["input_lengths"],
            seed=seed,
            num_generations=num_generations,
            greedy=greedy,
            sampling=sampling,
            first_prompt=first_prompt,
        )

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
        """`generate` in a single piece: this decoder completes a batch as a whole."""
        result = self.generate(
            prompts,
            seed=seed,
            num_generations=num_generations,
            greedy=greedy,
            sampling=sampling,
            first_prompt=first_prompt,
        )
        yield list(range(first_prompt, first_prompt + len(prompts["input_lengths"]))), result

    def sleep(self, level: int = 1) -> None:
        """Nothing to give back: caches are freed after every call."""

    def wake(self, tags: list[str] | None = None) -> None:
        """Nothing to take again."""

    def attestation(self) -> dict[str, Any]:
        """What this worker runs on and with."""
        return {
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "executable": sys.executable,
            "prefix": sys.prefix,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "num_threads": torch.get_num_threads(),
            "weights_version": self._generator.version,
            **self._generator.attestation(),
        }

    def shutdown(self) -> None:
        """Nothing to clean up: weights and caches go with the process."""
