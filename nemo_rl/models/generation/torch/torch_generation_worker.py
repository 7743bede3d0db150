"""One generation worker: a `TorchGenerator` in a Ray actor. Runs in the BASE venv."""

from __future__ import annotations

import socket
from typing import Any

import torch

from nemo_rl import settings
from nemo_rl.models.generation.config import GenerationConfig, SamplingConfig
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.generation.worker_base import GenerationWorkerBase
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.models.worker_process import freeze_modules, take_cpu_share


class TorchGenerationWorker(GenerationWorkerBase):
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
            take_cpu_share(config.num_threads, num_local_workers)
        self._generator = TorchGenerator(
            model_name,
            config,
            max_sequence_length=max_sequence_length,
            tokenizer_name=tokenizer_name,
            precision=precision,
            device="cuda" if use_gpu else "cpu",
            name=f"generation worker {settings.RANK.get()} on {socket.gethostname()}",
        )
        freeze_modules()

    def update_weights(self, update: WeightUpdate) -> str:
        """Load published weights; the digest over this worker's memory. See `TorchGenerator.update_weights`."""
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

    def attestation(self) -> dict[str, Any]:
        """What this worker runs on and with."""
        return {
            **super().attestation(),
            "weights_version": self._generator.version,
            **self._generator.attestation(),
        }
