"""One generation worker: a `TorchGenerator` in a Ray actor. Runs in the BASE venv."""

from __future__ import annotations

import socket

from nemo_rl import settings
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.generation.worker_base import GeneratorWorker
from nemo_rl.models.worker_process import starts_without_collecting, take_cpu_share


class TorchGenerationWorker(GeneratorWorker[TorchGenerator]):
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

    @starts_without_collecting
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
